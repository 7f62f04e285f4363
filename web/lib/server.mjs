// What is asked of the server, and what of the graph is asked about.
import { api } from "../../../scripts/api.js";

const SECONDS = 0.3; // between two looks at the graph

async function answered(response) {
  if (!response.ok) throw new Error((await response.text()) || `the server answered ${response.status}`);
  return response.json();
}

/** The answer of a GET. Throws an Error with what the server said. */
export async function get(path) {
  return answered(await api.fetchApi(path, { cache: "no-store" }));
}

/** The answer of a POST of `body`: JSON, or a file as it is. */
export async function post(path, body = {}) {
  const content = body instanceof Blob ? body : JSON.stringify(body);
  const type = body instanceof Blob ? "application/octet-stream" : "application/json";
  return answered(await api.fetchApi(path, { method: "POST", body: content, headers: { "Content-Type": type } }));
}

/** A file that the server describes as {filename, subfolder, type}. */
export function fileUrl({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/** Call `handler` with the detail of the server's event, until the returned function is called. */
export function on(event, handler) {
  const listener = ({ detail }) => handler(detail);
  api.addEventListener(event, listener);
  return () => api.removeEventListener(event, listener);
}

/**
 * Ask the server whenever the question changes. `question` gives what is to be posted to `path`, or a text that says why nothing
 * can be asked; `show` gets (answer, what is wrong). Looking again and again sees what no event tells of: values of nodes further up,
 * links, undo. Returns a function that ends it, with `again` to ask the same anew.
 */
export function watch(path, question, show) {
  let last = null;
  const look = async () => {
    if (document.hidden) return;
    const asked = question();
    const text = JSON.stringify(asked);
    if (text === last) return;
    last = text;
    if (typeof asked === "string") return show(null, asked);
    try {
      const answer = await post(path, asked);
      if (text === last) show(answer, null);
    } catch (error) {
      if (text === last) show(null, error.message);
    }
  };
  const timer = setInterval(look, SECONDS * 1000);
  const end = () => clearInterval(timer);
  end.again = () => (last = null);
  return end;
}
