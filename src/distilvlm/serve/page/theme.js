// Runs before anything is drawn, so that a page in chosen colours never flashes in the others.
"use strict";

const chosen = localStorage.getItem("distilvlm.theme");
if (chosen) document.documentElement.dataset.theme = chosen;
