// The server's API, and what goes wrong with it in plain words.

/** Something to tell the user. `wait`: seconds the server asks for before the next try; `key`: a key is missing or wrong. */
export class Problem extends Error {
  constructor(message, { wait = 0, key = false } = {}) {
    super(message);
    this.wait = wait;
    this.key = key;
  }
}

const GONE = "The server does not answer. It may have been stopped, or the connection to it is gone.";

/** What the server answers with: names, and what each model can do. */
export async function models() {
  const response = await ask("v1/models");
  return (await response.json()).data;
}

/** An answer as it comes: `{text, finish, usage}`, each of them only where the event has it. Ends whole or throws. */
export async function* answer(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await ask("v1/chat/completions", { method: "POST", body, signal, headers: { "Content-Type": "application/json" } });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Problem(`The answer broke off: ${event.error.message}`);
    const choice = event.choices?.[0];
    yield { text: choice?.delta?.content ?? "", finish: choice?.finish_reason, usage: event.usage };
  }
  throw new Problem("The answer broke off: the server closed the connection.");
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("distilvlm.key");
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(GONE);
  }
  if (response.ok) return response;
  throw await told(response, Boolean(key));
}

async function told(response, keyed) {
  const said = await response.json().then((body) => body.error?.message, () => undefined);
  const wait = Number(response.headers.get("Retry-After")) || 0;
  switch (response.status) {
    case 401:
      return new Problem(keyed ? "The server does not know this API key." : "This server wants an API key.", { key: true });
    case 429:
      return new Problem(`The server is busy: it has as many questions as it can queue.`, { wait });
    case 503:
      return new Problem("The server is about to stop and takes no more questions.", { wait });
    case 413:
      return new Problem("The conversation with its pictures is larger than the server takes. Begin a new one, or use fewer pictures.");
  }
  const why = said ?? `status ${response.status}`;
  return new Problem(response.status < 500 ? `The server can't answer this: ${why}` : `The server failed: ${why}`);
}

/** The `data` of server-sent events, each as soon as it is whole. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (buffer + value).split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(`The answer broke off: ${error.message}.`);
  } finally {
    reader.cancel().catch(() => {});
  }
}
