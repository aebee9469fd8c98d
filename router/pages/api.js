// The gateway's HTTP API as this page uses it. Nothing here touches the document.

export class Refusal extends Error {
  constructor(message, { status = 0, code = "", retryAfterS = 0 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

// A key is needed only where the gateway runs with a key file; it lives as long as the tab.
export const apiKey = {
  get: () => sessionStorage.getItem("tiebreak.key") ?? "",
  set: (key) => sessionStorage.setItem("tiebreak.key", key),
};

async function call(method, path, { body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The gateway cannot be reached. Is it running?", { code: "unreachable" });
  }
  if (!response.ok) throw await refusalOf(response);
  return response;
}

async function refusalOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not our JSON (a proxy's page, say): the status line has to do.
  }
  return new Refusal(error.message || `The gateway answered ${response.status} ${response.statusText}`.trim(), {
    status: response.status,
    code: error.code ?? "",
    retryAfterS: Number(response.headers.get("Retry-After")) || 0,
  });
}

// The data of each server-sent event, until [DONE]. A stream that ends without it was cut off.
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Refusal("The connection ended before the answer did.", { code: "cut_off" });
    const lines = (pending + value).split(/\r?\n/);
    pending = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Streams one chat request. Calls on.pair(pair) at most once, before any text; on.void(pair) when a side of it
// was lost; on.text(index, text); on.finish(index, reason). Resolves to { id, variant, version }.
export async function chat({ model, messages, user, mayPair, signal, on }) {
  const response = await call("POST", "/v1/chat/completions", {
    signal,
    body: { model, messages, user, stream: true, preference: { pair: mayPair ? "auto" : "never" } },
  });
  const served = {
    id: "",
    variant: response.headers.get("x-tiebreak-variant") ?? "",
    version: response.headers.get("x-tiebreak-version") ?? "",
  };
  const pairId = response.headers.get("x-tiebreak-pair-id");
  if (pairId) on.pair({ pair_id: pairId, token: response.headers.get("x-tiebreak-pair-token") });
  for await (const chunk of eventData(response.body)) {
    if (chunk.error) throw new Refusal(chunk.error.message, { code: chunk.error.code ?? "" });
    served.id ||= chunk.id;
    if (chunk.preference?.is_void) {
      Object.assign(served, { variant: chunk.preference.variant, version: chunk.preference.version });
      on.void(chunk.preference);
    }
    for (const choice of chunk.choices) {
      if (choice.delta?.content) on.text(choice.index, choice.delta.content);
      if (choice.finish_reason) on.finish(choice.index, choice.finish_reason);
    }
  }
  return served;
}

async function json(call) {
  const response = await call;
  try {
    return await response.json();
  } catch {
    throw new Refusal("The gateway's answer cannot be read. Is something else answering in its place?");
  }
}

const segment = encodeURIComponent;

export const consent = {
  get: (user) => json(call("GET", `/v1/users/${segment(user)}/consent`)),
  put: (user, pairing) => json(call("PUT", `/v1/users/${segment(user)}/consent`, { body: { pairing } })),
};

export const preferences = {
  post: ({ pair_id, token }, choice, user) =>
    json(call("POST", "/v1/preferences", { body: { pair_id, token, choice, user } })),
  get: (id) => json(call("GET", `/v1/preferences/${segment(id)}`)),
  remove: (id) => json(call("DELETE", `/v1/preferences/${segment(id)}`)),
};

export const feedback = (completionId, rating, user) =>
  call("POST", "/v1/feedback", { body: { completion_id: completionId, rating, user } });

export const models = () => json(call("GET", "/v1/models"));
