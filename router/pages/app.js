// The chat page: one conversation, its turns and their verdicts. No build step, no framework.
// api.js talks to the gateway, view.js draws, receipts.js reads receipts, live.js polls; this file decides.

import { Refusal, apiKey, chat, consent, feedback, preferences } from "./api.js";
import { followReceipt, watchModel } from "./live.js";
import * as view from "./view.js";

const byId = (id) => document.getElementById(id);
const page = {
  welcome: byId("welcome"), conversation: byId("conversation"), problem: byId("problem"),
  composer: byId("composer"), prompt: byId("prompt"), send: byId("send"), stop: byId("stop"),
  consent: byId("consent"), newChat: byId("new-chat"), model: byId("model"), announcer: byId("announcer"),
};
const CHOICE_OF_KEY = { 1: "a", 2: "b", 0: "tie", 3: "both_bad", s: "skip" };
const NUDGE = 240; // pixels that the page may move by itself to show the verdict's buttons: less than a reader loses
const hasKeyboard = matchMedia("(pointer: fine)").matches;

const user = rememberedUser();
let turns = []; // answered, in order: { prompt, answers: [{ text, finish, view }], pair, choice, view }
let running = null; // the AbortController of the turn being answered
let consenting = Promise.resolve(); // changes of consent on their way to the gateway, one after another
let hasChosen = false; // the switch was moved here: what the gateway knew before no longer matters

// A random name for this browser: the gateway knows consent and verdicts by it, and nothing else.
function rememberedUser() {
  const known = localStorage.getItem("tiebreak.user");
  if (known) return known;
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  const made = "web-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  localStorage.setItem("tiebreak.user", made);
  return made;
}

// What the conversation says so far: of a pair, the chosen answer; of a tie or a skip, the left one.
function history() {
  return turns.flatMap((turn) => {
    const answer = turn.answers[turn.choice === "b" ? 1 : 0];
    return [{ role: "user", content: turn.prompt }, { role: "assistant", content: answer.text }];
  });
}

async function ask(prompt) {
  if (running) return;
  showProblem(null);
  const open = awaitingVerdict();
  if (open) decide(open, "skip");
  const messages = [...history(), { role: "user", content: prompt }];
  const turn = { prompt, answers: [], pair: null, choice: null, view: view.turnView(prompt) };
  page.welcome.hidden = true;
  page.conversation.append(turn.view.root);
  addAnswer(turn);
  const own = new AbortController();
  setRunning(own);
  announce("Waiting for the answer.");
  turn.view.root.scrollIntoView({ block: "start" });
  try {
    await consenting;
    const model = gateway.policy;
    const served = await chat({ model, messages, user, mayPair: page.consent.checked, signal: own.signal, on: into(turn) });
    finishTurn(turn, served);
  } catch (error) {
    failTurn(turn, error);
  } finally {
    if (running === own) setRunning(null);
    view.dropBusy(turn.view);
  }
}

function addAnswer(turn) {
  const answer = { text: "", finish: null, view: view.answerView() };
  turn.answers.push(answer);
  turn.view.answers.append(answer.view.root);
  view.nameAnswers(turn);
  return answer;
}

// What arrives from the stream, drawn as it comes.
function into(turn) {
  const answerAt = (index) => {
    while (turn.answers.length <= index) addAnswer(turn);
    return turn.answers[index];
  };
  return {
    pair(pair) {
      turn.pair = pair;
      answerAt(1);
    },
    void() {
      turn.pair = null;
    },
    text(index, text) {
      const answer = answerAt(index);
      answer.text += text;
      answer.view.text.append(text);
    },
    finish(index, reason) {
      const answer = answerAt(index);
      answer.finish = reason;
      view.showFinish(answer.view, reason);
    },
  };
}

function finishTurn(turn, served) {
  if (!turn.pair) keepWholeAnswer(turn);
  turns.push(turn);
  if (turn.pair) {
    view.askForVerdict(turn, (choice) => decide(turn, choice));
    const covered = coveredHeight(turn.view.foot);
    if (covered > 0 && covered < NUDGE) scrollBy(0, covered + 12);
    announce("Two answers are ready. Press 1 or 2 for the one you prefer, 0 for a tie.");
    if (!page.prompt.value && hasKeyboard) turn.view.root.focus({ preventScroll: true });
  } else {
    const [answer] = turn.answers;
    view.nameVersion(answer.view, served);
    view.thumbs(answer.view, (rating) => rate(served.id, answer, rating));
    announce(`Answer: ${answer.text}`);
    focusPrompt();
  }
}

// How much of an element lies behind the composer or below it.
function coveredHeight(element) {
  return element.getBoundingClientRect().bottom - page.composer.getBoundingClientRect().top;
}

// A pair that lost a side is a normal answer: the side that finished.
function keepWholeAnswer(turn) {
  const whole = turn.answers.find(({ finish }) => finish && finish !== "error") ?? turn.answers[0];
  for (const answer of turn.answers) if (answer !== whole) answer.view.root.remove();
  turn.answers = [whole];
  view.nameAnswers(turn);
}

// A stopped turn keeps what it said; a failed or empty one goes, and its prompt can be sent again.
function failTurn(turn, error) {
  const isStopped = error.name === "AbortError";
  if (!turn.view.root.isConnected) return; // a new chat was begun meanwhile
  if (isStopped && turn.answers[0].text) {
    turn.pair = null;
    turns.push(turn);
    for (const answer of turn.answers) if (!answer.finish) view.showFinish(answer.view, "stopped");
    announce("Stopped.");
  } else {
    turn.view.root.remove();
    page.welcome.hidden = turns.length > 0;
    if (!page.prompt.value) setPrompt(turn.prompt);
    if (!isStopped) showProblem(error, () => retry(turn.prompt));
  }
  focusPrompt();
}

function retry(prompt) {
  if (page.prompt.value === prompt) setPrompt("");
  ask(prompt);
}

function awaitingVerdict() {
  const turn = turns.at(-1);
  return turn?.pair && !turn.choice ? turn : null;
}

async function decide(turn, choice) {
  if (turn.choice) return;
  turn.choice = choice;
  view.showVerdict(turn, choice, { isSettled: false });
  focusPrompt();
  try {
    const receipt = await preferences.post(turn.pair, choice, user);
    view.showVerdict(turn, choice, { isSettled: true });
    view.nameVersion(turn.answers[0].view, receipt.revealed.a);
    view.nameVersion(turn.answers[1].view, receipt.revealed.b);
    announce("Your verdict is recorded.");
    followReceipt(receipt, turn.view.foot, {
      onLive: ({ version }) => announce(`Version ${version} has learned from your verdict and is live.`),
      onProblem: showProblem,
    });
    turn.view.foot.scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    undecide(turn, choice, error);
  }
}

// The gateway did not take the verdict: say why. While the turn is the last one it can be judged again, unless
// the refusal is final.
function undecide(turn, choice, error) {
  const isFinal = error.status >= 400 && error.status < 500 && error.status !== 429 && error.code !== "invalid_api_key";
  if (isFinal || turns.at(-1) !== turn) {
    view.showVerdict(turn, "refused", { isSettled: true });
    return showProblem(error);
  }
  turn.choice = null;
  view.askForVerdict(turn, (again) => decide(turn, again));
  showProblem(error, () => decide(turn, choice));
}

async function rate(completionId, answer, rating) {
  try {
    await feedback(completionId, rating, user);
    view.pressThumb(answer.view, rating);
    announce("Thank you, recorded.");
  } catch (error) {
    showProblem(error, () => rate(completionId, answer, rating));
  }
}

async function loadConsent() {
  try {
    const { pairing } = await consent.get(user);
    if (!hasChosen) page.consent.checked = pairing;
  } catch (error) {
    showProblem(error, loadConsent);
  }
}

function changeConsent() {
  hasChosen = true;
  const wanted = page.consent.checked;
  consenting = consenting.then(() => writeConsent(wanted));
}

async function writeConsent(wanted) {
  const isStillWanted = () => page.consent.checked === wanted;
  try {
    const { pairing } = await consent.put(user, wanted);
    if (isStillWanted()) page.consent.checked = pairing;
    announce(wanted ? "You may now be shown two answers." : "You get single answers.");
  } catch (error) {
    if (isStillWanted()) page.consent.checked = !wanted;
    showProblem(error);
  }
}

function showProblem(error, again) {
  const acts = { again, setKey: error?.code === "invalid_api_key" ? apiKey.set : null, close: () => showProblem(null) };
  view.drawProblem(page.problem, error, acts);
}

function startAgain() {
  running?.abort();
  turns = [];
  page.conversation.replaceChildren();
  page.welcome.hidden = false;
  showProblem(null);
  focusPrompt();
}

function setRunning(controller) {
  running = controller;
  page.send.hidden = Boolean(controller);
  page.stop.hidden = !controller;
}

function setPrompt(text) {
  page.prompt.value = text;
  fitPrompt();
}

function fitPrompt() {
  page.prompt.style.height = "auto";
  page.prompt.style.height = `${page.prompt.scrollHeight + 2}px`;
}

// On a phone the keyboard would jump up, so there the reader taps the box herself.
function focusPrompt() {
  if (hasKeyboard) page.prompt.focus({ preventScroll: true });
}

function announce(text) {
  page.announcer.textContent = text;
}

function send() {
  const prompt = page.prompt.value.trim();
  if (!prompt || running) return;
  setPrompt("");
  ask(prompt);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.key === "Escape" && running) running.abort();
  const choice = CHOICE_OF_KEY[event.key.toLowerCase()];
  const open = awaitingVerdict();
  if (!choice || !open || event.repeat || event.target.matches("input, textarea, select")) return;
  event.preventDefault();
  decide(open, choice);
}

page.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
page.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
page.prompt.addEventListener("input", fitPrompt);
page.stop.addEventListener("click", () => running?.abort());
page.newChat.addEventListener("click", startAgain);
page.consent.addEventListener("change", changeConsent);
document.addEventListener("keydown", onKey);
for (const sample of document.querySelectorAll(".sample")) {
  sample.addEventListener("click", () => ask(sample.textContent));
}

loadConsent();
const gateway = watchModel(page.model, (before, now) => {
  turns.at(-1)?.view.root.append(view.modelChange(before, now));
  announce(`The model has changed: it is now version ${now}.`);
});
