export function addDatasetPanel() {}
