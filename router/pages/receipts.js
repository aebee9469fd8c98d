// A verdict's way from the click to the version that learned from it, as the gateway's receipt tells it.
// Pure: stages reached in, steps to draw out.

const LEARNS = new Set(["a", "b"]); // the other verdicts teach no preference

const LABELS = {
  accepted: "Accepted",
  stored: "Stored",
  trained: "Trained",
  live: "Live",
  dropped: "Not used",
  retracted: "Taken back",
};

export function elapsed(from, to) {
  const s = Math.max(0, (Date.parse(to) - Date.parse(from)) / 1000);
  if (s < 10) return `${s.toFixed(1)} s`;
  return s < 120 ? `${Math.round(s)} s` : `${Math.round(s / 60)} min`;
}

// [{ name, label, detail, state: "done" | "waiting" | "next" | "dropped" }] from { stages, choice }.
export function stepsOf({ stages, choice }) {
  const reached = new Map(stages.map((stage) => [stage.stage, stage]));
  const names = ["accepted", "stored"];
  const isOut = reached.has("dropped") || reached.has("retracted");
  if (LEARNS.has(choice)) names.push(...["trained", "live"].filter((name) => !isOut || reached.has(name)));
  names.push(...["dropped", "retracted"].filter((name) => reached.has(name)));
  const firstOpen = names.find((name) => !reached.has(name));
  return names.map((name) => ({
    name,
    label: LABELS[name],
    detail: detailOf(reached.get(name), reached.get("accepted")),
    state: stateOf(name, reached.has(name), name === firstOpen),
  }));
}

function stateOf(name, isReached, isFirstOpen) {
  if (name === "dropped" || name === "retracted") return "dropped";
  if (isReached) return "done";
  return isFirstOpen ? "waiting" : "next";
}

function detailOf(stage, accepted) {
  if (!stage) return "";
  const after = stage.at && accepted?.at && stage !== accepted ? `after ${elapsed(accepted.at, stage.at)}` : "";
  const kept = stage.durable === "outbox" ? "on the gateway's disk" : "";
  return [stage.batch, stage.version, stage.reason, kept, after].filter(Boolean).join(" · ");
}

// Whether nothing more can become of this verdict, as far as this page can wait for it.
export function isFinal({ stages, choice }) {
  const reached = new Set(stages.map((stage) => stage.stage));
  if (["live", "dropped", "retracted"].some((name) => reached.has(name))) return true;
  return !LEARNS.has(choice) && reached.has("stored");
}
