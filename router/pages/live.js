// What changes while the page is open: the stable version, and how far each verdict has come.
// Both are polled, only while the page is visible; a poll that fails is tried again at the next turn.

import { Refusal, models, preferences } from "./api.js";
import { isFinal, stepsOf } from "./receipts.js";
import { drawReceipt, receiptView } from "./view.js";

const MODEL_EVERY_MS = 3000;
const RECEIPT_EVERY_MS = 1000;
const RECEIPT_GIVE_UP_MS = 30 * 60 * 1000;

const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

async function whileVisible(everyMs, act) {
  for (;;) {
    if (!document.hidden) await act();
    await sleep(everyMs);
  }
}

// Shows the stable version in `badge` and tells onChange(before, now) when another one takes its place.
// Returns { policy }: the name that chats with the gateway's first policy ask for.
export function watchModel(badge, onChange) {
  const gateway = { policy: "chat" };
  let known = "";
  whileVisible(MODEL_EVERY_MS, async () => {
    try {
      const { data } = await models();
      gateway.policy = data[0]?.id.split("@")[0] ?? gateway.policy;
      const now = data.find((model) => model.id === `${gateway.policy}@stable`)?.root ?? data[0]?.root ?? "";
      badge.dataset.state = now ? "ready" : "unknown";
      badge.querySelector(".version").textContent = now || "none yet";
      if (known && now && now !== known) onChange(known, now);
      known = now || known;
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      badge.dataset.state = "away";
      badge.querySelector(".version").textContent = error.status === 401 ? "needs a key" : "not reachable";
    }
  });
  return gateway;
}

// Follows one verdict until it is live, dropped or taken back, and draws its way into `host`.
export async function followReceipt({ id, accepted_at, choice }, host, { onLive, onProblem }) {
  let timeline;
  const view = receiptView(async () => {
    view.button.disabled = true;
    try {
      draw(await preferences.remove(id));
    } catch (error) {
      onProblem(error);
    } finally {
      view.button.disabled = false;
    }
  });
  function draw(latest) {
    timeline = { stages: latest.stages, choice };
    const names = timeline.stages.map((stage) => stage.stage);
    const isTakenBack = names.includes("retracted");
    const note = isTakenBack && names.includes("trained") ? "The model had learned from it already; it is not used again." : "";
    drawReceipt(view, stepsOf(timeline), { note, canUndo: !isTakenBack });
  }
  draw({ choice, stages: [{ stage: "accepted", at: accepted_at }] });
  host.append(view.root);
  const until = Date.now() + RECEIPT_GIVE_UP_MS;
  while (Date.now() < until) {
    if (!document.hidden) {
      try {
        draw(await preferences.get(id));
      } catch (error) {
        if (!(error instanceof Refusal)) throw error;
        if (error.status === 404) return; // the receipt's time is over
      }
      if (isFinal(timeline)) break;
    }
    await sleep(RECEIPT_EVERY_MS);
  }
  const live = timeline.stages.find((stage) => stage.stage === "live");
  if (live) onLive(live);
}
