// Indicator in the page's toolbar of whether the board is up to date, and a line at the bottom with what the user can do.
(function (remote) {
  "use strict";
  var WORDS = { connecting: "Connecting", live: "Live", waiting: "Waiting", reconnecting: "Reconnecting",
                offline: "Offline", ended: "Signed out", denied: "No access" };
  var MEANINGS = {
    connecting: "Connecting to the server",
    live: "Changes are shown immediately",
    waiting: "Changes are waiting: they are shown when you finish your input",
    reconnecting: "The connection was lost: reconnecting, checking every 5 seconds",
    offline: "The server cannot be reached: this is the last known board",
    ended: "You are no longer signed in",
    denied: "This board is no longer available to you"
  };
  var label = document.createElement("span"), bar = document.createElement("div"), shown = "";
  label.id = "remote-state";
  label.setAttribute("role", "status");
  label.setAttribute("aria-live", "polite");
  bar.id = "remote-trouble";
  bar.setAttribute("role", "status");

  remote.showState = function (state) {
    if (state === shown) return;
    shown = state;
    label.dataset.state = state;
    label.textContent = WORDS[state];
    label.title = MEANINGS[state];
  };
  // text: a line, or "" for none; link: its target, if any
  remote.showTrouble = function (text, link) {
    bar.textContent = text;
    bar.hidden = !text;
    if (!link) return;
    var anchor = document.createElement("a");
    anchor.href = link.href;
    anchor.textContent = link.text;
    bar.append(" ", anchor);
  };

  function place() {
    var buttons = document.querySelector(".nav-right") || document.querySelector(".nav");
    if (buttons) buttons.prepend(label);
    else { label.classList.add("remote-apart"); document.body.appendChild(label); }
    document.body.appendChild(bar);
  }
  remote.showTrouble("");
  remote.showState("connecting");
  document.addEventListener("DOMContentLoaded", place);
})(window.latticeRemote);
