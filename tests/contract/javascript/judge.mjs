// What the official OpenAI SDK for JavaScript sees of a router: `node judge.mjs URL SCENARIO` prints one JSON object.
import OpenAI from "openai";

const [url, scenario] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const ask = { model: "chat", messages: [{ role: "user", content: "one two three" }] };

async function chunks(more = {}, seen = []) {
  for await (const chunk of await client.chat.completions.create({ ...ask, ...more, stream: true })) seen.push(chunk);
  return seen;
}

// The text (with the names and arguments of calls), finish reasons and tokens of every choice.
function joined(seen) {
  const choices = {};
  for (const piece of seen.flatMap((chunk) => chunk.choices)) {
    const choice = (choices[piece.index] ??= { text: "", finishes: [], tokens: [] });
    choice.text += piece.delta.content ?? "";
    for (const { function: called } of piece.delta.tool_calls ?? []) choice.text += (called.name ?? "") + called.arguments;
    if (piece.finish_reason) choice.finishes.push(piece.finish_reason);
    choice.tokens.push(...(piece.logprobs?.content ?? []));
  }
  return Object.values(choices);
}

const scenarios = {
  async whole() {
    const { data, response } = await client.chat.completions.create(ask).withResponse();
    return { ...data, version: response.headers.get("x-tiebreak-version") };
  },
  async stream() {
    const seen = await chunks();
    return { choices: joined(seen), ids: [...new Set(seen.map((chunk) => chunk.id))] };
  },
  async usage() {
    const seen = await chunks({ stream_options: { include_usage: true } });
    return { choices: joined(seen), last: seen.at(-1), earlier: seen.slice(0, -1).map((chunk) => chunk.usage) };
  },
  async logprobs() {
    return { choices: joined(await chunks({ logprobs: true, top_logprobs: 2 })) };
  },
  async choices() {
    const whole = await client.chat.completions.create({ ...ask, n: 2 });
    const texts = whole.choices.map((choice) => choice.message.content);
    return { whole: texts, streamed: joined(await chunks({ n: 2 })) };
  },
  async pair() {
    const seen = await chunks({ user: "ann", preference: { pair: "always" } });
    return { choices: joined(seen), offers: seen.map((chunk) => chunk.preference ?? null) };
  },
  async helper() {
    const runner = client.chat.completions.stream({ ...ask, n: 2, stream_options: { include_usage: true } });
    const pieces = [];
    runner.on("content", (piece) => pieces.push(piece));
    const final = await runner.finalChatCompletion();
    return { text: pieces.join(""), final };
  },
  async tools() {
    const functions = ["get_weather", "set_mood"].map((name) => ({ type: "function", function: { name } }));
    const wish = { ...ask, messages: [{ role: "user", content: "First get_weather, then set_mood" }], tools: functions };
    const whole = await client.chat.completions.create(wish);
    const [{ message, finish_reason }] = whole.choices;
    const streamed = [];
    const finishes = [finish_reason];
    for await (const chunk of await client.chat.completions.create({ ...wish, stream: true })) {
      for (const piece of chunk.choices[0].delta.tool_calls ?? []) {
        const call = (streamed[piece.index] ??= { function: { arguments: "" } });
        Object.assign(call, { id: piece.id ?? call.id, type: piece.type ?? call.type });
        call.function.name ??= piece.function.name;
        call.function.arguments += piece.function.arguments ?? "";
      }
      if (chunk.choices[0].finish_reason) finishes.push(chunk.choices[0].finish_reason);
    }
    const helped = (await client.chat.completions.stream(wish).finalChatCompletion()).choices[0];
    finishes.push(helped.finish_reason);
    const results = message.tool_calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: "sunny" }));
    const last = await client.chat.completions.create({ ...wish, messages: [...wish.messages, message, ...results] });
    return {
      whole: message.tool_calls,
      content: message.content,
      streamed,
      helper: helped.message.tool_calls,
      finishes,
      answered: last.choices[0].message.content,
    };
  },
  async refusals() {
    const wrong = [{ model: "nobody" }, { temperature: 9 }, { functions: [{ name: "f" }] }];
    const seen = [];
    for (const more of wrong) {
      try {
        await client.chat.completions.create({ ...ask, ...more });
      } catch (error) {
        const { status, code, param, type, requestID } = error;
        seen.push({ name: error.constructor.name, status, code, param, type, requestID });
      }
    }
    return { seen };
  },
  async reading() {
    const seen = [];
    const error = await chunks({}, seen).then(() => null, (failure) => failure.code ?? failure.message);
    return { choices: joined(seen), error };
  },
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return { ids, stable: await client.models.retrieve("chat@stable") };
  },
};

console.log(JSON.stringify(await scenarios[scenario]()));
