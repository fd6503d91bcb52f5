// Says in a word whether what is shown is up to date, in the page's own bar of buttons; and in a line at the bottom what
// there is to be done about it.
(function (remote) {
  "use strict";
  var WORDS = { connecting: "Connecting", live: "Live", waiting: "Waiting", reconnecting: "Reconnecting",
                offline: "Offline", ended: "Signed out", denied: "No access" };
  var MEANINGS = {
    connecting: "Asking the server",
    live: "Changes are shown as soon as they are made",
    waiting: "There are changes: they are shown when you have finished what you are at",
    reconnecting: "The connection was lost: it is being made again, and the page looks every 5 seconds meanwhile",
    offline: "The server can't be reached: this is the board as it was",
    ended: "The server does not know who you are any more",
    denied: "The server does not show this board any more"
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
  // text: a line, or "" for none; link: what it leads to, if anywhere
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
