"""``/docs``: the OpenAPI document as a page that needs nothing from anywhere else."""

from __future__ import annotations

from typing import Final

PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tiebreak API</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
code, pre { font: 14px/1.5 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8884; border-radius: .4rem; }
details { border-top: 1px solid #8884; padding: .6rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
.method { display: inline-block; min-width: 4.5rem; font-weight: 700; }
</style></head>
<body><h1>Tiebreak API</h1>
<p>The machine-readable form is <a href="/openapi.json">/openapi.json</a>.</p>
<main id="operations">Loading.</main>
<h2>Schemas</h2><div id="schemas"></div>
<script>
const make = (tag, text, parent) => {
  const element = document.createElement(tag);
  element.textContent = text ?? "";
  parent.append(element);
  return element;
};
const name = (schema) => schema?.$ref ? schema.$ref.split("/").pop() : JSON.stringify(schema ?? {});
const contents = (content) => Object.entries(content ?? {})
  .map(([type, { schema, itemSchema }]) => `${name(schema ?? itemSchema)} (${type})`);
function drawOperation(path, method, operation, host) {
  const details = make("details", "", host);
  const summary = make("summary", "", details);
  make("span", method.toUpperCase(), summary).className = "method";
  make("code", path, summary);
  make("span", " " + operation.summary, summary);
  const lines = operation.parameters.map((p) => `${p.in} ${p.name}${p.required ? " (required)" : ""}`);
  if (operation.requestBody) lines.push("body " + contents(operation.requestBody.content).join(", "));
  for (const [status, answer] of Object.entries(operation.responses)) {
    lines.push(`${status} ${answer.description}: ${contents(answer.content).join(", ")}`);
  }
  make("pre", lines.join("\\n"), details);
}
fetch("/openapi.json").then((response) => response.json()).then((api) => {
  const host = document.getElementById("operations");
  host.textContent = "";
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) drawOperation(path, method, operation, host);
  }
  const schemas = document.getElementById("schemas");
  for (const [title, schema] of Object.entries(api.components.schemas)) {
    const details = make("details", "", schemas);
    make("summary", title, details);
    make("pre", JSON.stringify(schema, null, 2), details);
  }
});
</script></body></html>
"""
