// What the page draws. Text from models and servers only ever enters through textContent.

// element("p", { class: "note", onclick: f }, "text", child): attributes by name, listeners by on….
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const FINISH_NOTES = {
  length: "Cut at the length limit",
  content_filter: "Stopped by the safety filter",
  stopped: "Stopped",
};
const LETTERS = ["a", "b"];
const VERDICTS = {
  a: "You preferred answer 1",
  b: "You preferred answer 2",
  tie: "A tie",
  both_bad: "Neither was good",
  skip: "Skipped",
  refused: "No verdict was recorded",
};

export function turnView(prompt) {
  const answers = element("div", { class: "answers" });
  const foot = element("div", { class: "turn-foot" });
  const root = element(
    "article",
    { class: "turn", tabindex: "-1", "aria-label": "Question and answer" },
    element("h2", { class: "asked" }, element("span", { class: "visually-hidden" }, "You: "), prompt),
    answers,
    foot,
  );
  return { root, answers, foot };
}

export function answerView() {
  const text = element("p", { class: "answer-text" });
  const title = element("h3", { class: "answer-title" }, "Answer");
  const version = element("span", { class: "version", hidden: true });
  const foot = element("div", { class: "answer-foot" });
  const root = element(
    "section",
    { class: "answer", "aria-busy": "true" },
    element("div", { class: "answer-head" }, title, version),
    text,
    foot,
  );
  return { root, text, title, version, foot };
}

export function nameVersion(view, { variant, version }) {
  view.version.textContent = [variant, version].filter(Boolean).join(" ");
  view.version.hidden = !view.version.textContent;
}

export function showFinish(view, reason) {
  view.root.setAttribute("aria-busy", "false");
  const note = FINISH_NOTES[reason];
  if (note) view.foot.append(element("span", { class: "note" }, note));
}

export function nameAnswers({ answers, view }) {
  view.root.classList.toggle("paired", answers.length > 1);
  answers.forEach((answer, index) => {
    answer.view.title.textContent = answers.length > 1 ? `Answer ${index + 1}` : "Answer";
  });
}

export function dropBusy(turn) {
  for (const answer of turn.answers.children) answer.setAttribute("aria-busy", "false");
}

export function modelChange(before, now) {
  return element(
    "p",
    { class: "model-change" },
    "The model has changed: ",
    element("span", { class: "version" }, before),
    " → ",
    element("span", { class: "version" }, now),
  );
}

// Buttons 1 and 2 under the answers, and the row of other verdicts. A click anywhere on an answer counts too,
// unless it ends a text selection.
export function askForVerdict(turn, decide) {
  turn.view.answers.setAttribute("role", "group");
  turn.view.answers.setAttribute("aria-label", "Two answers: which do you prefer?");
  turn.answers.forEach(({ view }, index) => {
    const letter = LETTERS[index];
    view.root.classList.remove("preferred", "passed-over");
    view.root.classList.add("choosable");
    view.root.onclick = (event) => {
      if (getSelection().isCollapsed || event.target.closest("button")) decide(letter);
    };
    view.foot.append(verdictButton("choose", letter, `Prefer answer ${index + 1}`, index + 1));
  });
  const others = [
    verdictButton("quiet", "tie", "Tie", 0, decide),
    verdictButton("quiet", "both_bad", "Both bad", 3, decide),
    verdictButton("quiet", "skip", "Skip", "S", decide),
  ];
  turn.view.foot.replaceChildren(element("div", { class: "other-verdicts" }, ...others));
}

function verdictButton(style, choice, label, key, decide) {
  const hint = element("kbd", { "aria-hidden": "true" }, String(key));
  const attributes = { type: "button", class: style, "data-choice": choice, "aria-keyshortcuts": String(key) };
  return element("button", decide ? { ...attributes, onclick: () => decide(choice) } : attributes, label, hint);
}

export function showVerdict(turn, choice, { isSettled }) {
  const isPick = choice === "a" || choice === "b";
  turn.answers.forEach(({ view }, index) => {
    view.root.onclick = null;
    view.root.classList.remove("choosable");
    view.root.classList.toggle("preferred", LETTERS[index] === choice);
    view.root.classList.toggle("passed-over", isPick && LETTERS[index] !== choice);
    view.foot.querySelector(".choose")?.remove();
  });
  const verdict = element("p", { class: "verdict" }, VERDICTS[choice]);
  verdict.classList.toggle("settling", !isSettled);
  turn.view.foot.replaceChildren(verdict);
}

// The way of one verdict: which steps are done, when, and which one it waits for.
export function receiptView(undo) {
  const steps = element("ol", { class: "steps", "aria-label": "What became of your click" });
  const note = element("p", { class: "note", hidden: true });
  const button = element("button", { type: "button", class: "quiet", onclick: undo }, "Undo");
  const root = element("div", { class: "receipt" }, steps, note, button);
  return { root, steps, note, button };
}

export function drawReceipt(view, steps, { note, canUndo }) {
  view.steps.replaceChildren(
    ...steps.map((step) =>
      element(
        "li",
        { class: "step", "data-step": step.name, "data-state": step.state },
        element("span", { class: "step-name" }, step.label),
        step.detail ? element("span", { class: "step-detail" }, step.detail) : null,
      ),
    ),
  );
  view.note.textContent = note;
  view.note.hidden = !note;
  view.button.hidden = !canUndo;
}

export function thumbs(view, rate) {
  const thumb = (rating, label) => {
    const button = element("button", { type: "button", class: "quiet thumb", "aria-pressed": "false", "data-rating": rating }, label);
    button.addEventListener("click", () => rate(rating, button));
    return button;
  };
  view.foot.append(element("div", { class: "thumbs" }, thumb(1, "Good answer"), thumb(-1, "Bad answer")));
}

export function pressThumb(view, rating) {
  for (const button of view.foot.querySelectorAll(".thumb")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.rating) === rating));
  }
}

// An error with what can be done about it. `acts`: again, setKey (both may be null), close.
export function drawProblem(host, error, acts) {
  host.hidden = !error;
  if (!error) return host.replaceChildren();
  const wait = error.retryAfterS ? ` Try again in ${error.retryAfterS} s.` : "";
  const then = (act) => () => {
    acts.close();
    act?.();
  };
  const button = (label, act) => element("button", { type: "button", class: "quiet", onclick: then(act) }, label);
  const buttons = [acts.again && button("Try again", acts.again), button("Dismiss")].filter(Boolean);
  host.replaceChildren(
    element("p", {}, error.message + wait),
    ...(acts.setKey ? [keyField(acts.setKey)] : []),
    element("div", { class: "problem-acts" }, ...buttons),
  );
}

function keyField(setKey) {
  const input = element("input", { type: "password", autocomplete: "off", spellcheck: "false" });
  input.addEventListener("input", () => setKey(input.value.trim()));
  return element("label", { class: "key" }, "API key, kept until this tab is closed", input);
}
