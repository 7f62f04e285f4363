"""Files: atomic writes, safetensors, safe reading of torch files, videos."""
