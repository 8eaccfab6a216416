// Asking the server for text: requests in OpenAI's form, and the answers as they grow, token by token.
// Knows nothing about the page; `changed()` is called whenever an answer has grown.
import { ApiError, post, stream } from "./api.js";
import { t } from "./i18n.js";
import { messagesOf, path } from "./store.js";
const TOP = 8; // alternatives asked for with every token
const idsOf = (tokens) => tokens.map(({ id }) => id);

/** The part of a request that says how tokens are chosen, and that their ids are wanted. */
function sampling({ max_tokens, seed, stop, ...settings }) {
  const stops = stop.split("\n").filter(Boolean).map((one) => one.replaceAll("\\n", "\n"));
  return { ...settings, ...(max_tokens && { max_tokens }), ...(seed !== null && { seed }),
    ...(stops.length && { stop: stops }), return_token_ids: true, stream_options: { include_usage: true } };
}

/** Let the model write `node`, the answer to what stands before it. One without a chat template continues the text. */
export function answer(conversation, node, { model, settings, ...rest }) {
  const body = { model: model.name, ...sampling(settings) };
  node.plain = !model.chat;
  const chat = { ...body, messages: messagesOf(conversation, node), logprobs: true, top_logprobs: TOP };
  if (!node.plain) return write(node, "v1/chat/completions", chat, rest);
  const shown = path(conversation);
  const prompt = conversation.system + shown.slice(0, shown.indexOf(node)).map(({ content }) => content).join("");
  return write(node, "v1/completions", { ...body, prompt, logprobs: TOP }, rest);
}

/** Let the model write on from the first `count` tokens of the answer `old` and, where it is given, the token `other`
 * in the place of the next one. `node` becomes the new version. */
export async function continueFrom(old, count, other, node, { settings, signal, changed }) {
  const { model, plain, prompt } = old;
  const tokens = old.tokens.slice(0, count);
  if (other) tokens.push({ ...other, top: old.tokens[count].top, picked: true });
  Object.assign(node, { plain, prompt, tokens });
  const textNow = async () => {
    const told = await post("v1/detokenize", { model, tokens: idsOf(tokens) }, { signal });
    return old.content.match(/^\s*/)[0] + told.prompt.trimStart();
  };
  try {
    const text = await textNow();
    node.content = text.replace(/\ufffd+$/, ""); // a character that is cut here comes whole with what follows
    const told = other && (await post("api/inside/tokens", { model, ids: [other.id] }, { signal }));
    if (told?.tokens[0].special) { // the model could have ended its answer here
      node.finish = "stop";
      tokens.pop();
      return;
    }
    const body = { model, ...sampling(settings), prompt: [...prompt, ...idsOf(tokens)], logprobs: TOP };
    await write(node, "v1/completions", body, { signal, changed });
    if (text.endsWith("\ufffd")) node.content = await textNow();
  } catch (error) {
    failed(node, error);
  }
}

/** The alternatives of a token, asked for again where they are no longer in memory. */
export async function alternatives({ model, prompt, tokens }, place) {
  const ids = [...prompt, ...idsOf(tokens.slice(0, place))];
  const body = { model, prompt: ids, max_tokens: 1, temperature: 0, logprobs: TOP, return_token_ids: true };
  const ask = async () => (await post("v1/completions", body)).choices[0].logprobs.content[0]?.top_logprobs ?? [];
  return (tokens[place].top ??= (await ask()).map(tokenOf));
}

/** Read one streamed answer into `node`. What had come before an error or a stop stays. */
async function write(node, address, body, { signal, changed }) {
  node.tokens ??= [];
  const before = node.tokens.length;
  const began = performance.now();
  const characters = new TextDecoder();
  let first = null;
  try {
    for await (const { prompt_token_ids: prompt, usage, choices } of stream(address, body, { signal })) {
      node.prompt ??= prompt;
      if (usage) node.read = usage.prompt_tokens;
      if (!choices?.length) continue;
      const [{ delta, text = delta?.content ?? "", logprobs, finish_reason: reason }] = choices;
      node.content += node.content || node.plain ? text : text.trimStart();
      for (const entry of logprobs?.content ?? []) {
        first ??= performance.now();
        const token = { ...tokenOf(entry), top: entry.top_logprobs.map(tokenOf) };
        const completed = characters.decode(new Uint8Array(entry.bytes ?? []), { stream: true });
        if (token.part && !completed.includes("\ufffd")) token.completed = completed;
        node.tokens.push(token);
      }
      node.finish = reason ?? node.finish;
      const count = node.tokens.length - before;
      const seconds = (performance.now() - first) / 1000;
      if (count) node.first = (first - began) / 1000;
      if (count > 1 && seconds > 0) node.rate = (count - 1) / seconds;
      changed();
    }
  } catch (error) {
    failed(node, error);
  }
}

function failed(node, error) {
  if (error.name === "AbortError") node.finish = "stopped";
  else node.error = error instanceof ApiError ? error.message : t("error.odd", { what: error.message });
}
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** A token of the server's logprobs; `part` where it is no text by itself, but some bytes of a character. */
function tokenOf({ token, token_id: id, bytes, logprob: exact }) {
  const logprob = Math.round(exact * 1000) / 1000;
  try {
    return { id, text: bytes ? utf8.decode(new Uint8Array(bytes)) : token, logprob };
  } catch {
    const text = bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
    return { id, text, logprob, part: true };
  }
}
