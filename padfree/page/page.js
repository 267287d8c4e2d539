"use strict";
const root = document.documentElement;
for (const choice of document.querySelectorAll("input[name=show]")) {
  choice.addEventListener("change", () => { root.dataset.show = choice.value; });
}
const only = document.getElementById("only");
if (only) only.addEventListener("change", () => { root.dataset.only = only.checked ? "changed" : "all"; });
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open]):not(.data)")];
  for (const part of opened) part.open = true;
});
window.addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
