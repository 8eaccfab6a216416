// The page's way to the server: JSON in and out, and answers that come in pieces as server-sent events.
// Where the server wants a key (401), the person is asked once; the key lives as long as the browser's tab.
import { t } from "./i18n.js";
import { attempt } from "./store.js";
const ROOT = new URL("..", import.meta.url); // the page also works below a path of another server
const KEPT = "scratchlm.key";
let key = attempt(() => sessionStorage.getItem(KEPT));
let askForKey = async () => null;
let asking = null;

/** Say how a person is asked for a key: `ask(refused)` gives a key or null; `refused`: whether one was wrong. */
export const onKeyWanted = (ask) => void (askForKey = ask);

/** What went wrong, as a sentence. */
export class ApiError extends Error {}

/** Whether there is another key than the one `used`; requests that were refused at the same time ask once. */
async function newKey(used) {
  if (key !== used) return true;
  asking ??= askForKey(used !== null).finally(() => (asking = null));
  const given = await asking;
  if (given) key = given;
  attempt(() => sessionStorage.setItem(KEPT, key));
  return Boolean(given);
}

async function request(path, { body, signal }) {
  const posted = body && { method: "POST", body: JSON.stringify(body) };
  for (;;) {
    const used = key;
    const headers = posted ? { "Content-Type": "application/json" } : {};
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(new URL(path.replace(/^\//, ""), ROOT), { ...posted, headers, signal }).catch(lost);
    if (response.ok) return response;
    if (response.status !== 401 || !(await newKey(used))) throw await errorOf(response);
  }
}

function lost(error, message = "error.unreachable") {
  throw error.name === "AbortError" ? error : new ApiError(t(message));
}

async function errorOf(response) {
  const { status, headers } = response;
  const told = (await response.json().catch(() => null))?.error; // none in a page of some proxy, perhaps
  const seconds = Number(headers.get("Retry-After"));
  return new ApiError(status === 401 ? t("error.key") : status === 429 && seconds ? t("error.busy", { seconds })
    : told?.message || t("error.status", { status: String(status) }));
}

/** The JSON at a path. */
export const get = async (path, options = {}) => (await request(path, options)).json();
/** The JSON that the server answers to `body`. */
export const post = async (path, body, options = {}) => (await request(path, { ...options, body })).json();

/** The JSON events of a streamed answer, as they come. One that breaks off before its end is an ApiError. */
export async function* stream(path, body, options = {}) {
  const response = await request(path, { ...options, body: { ...body, stream: true } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => lost(error, "error.broken"));
      if (done && !ended) throw new ApiError(t("error.broken"));
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines.filter((one) => one.startsWith("data:"))) { // others are comments, to keep it alive
        ended ||= line.slice(5).trim() === "[DONE]";
        if (ended) break;
        const event = JSON.parse(line.slice(5));
        if (event.error) throw new ApiError(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the server notices that nobody reads any more
  }
}
