// Event stream: redraws the page after each change.
(function (remote) {
  "use strict";
  var SILENCE_MS = 22000, CHECK_MS = 3000;  // the server sends at least every 10 s
  var FIRST_RETRY_MS = 1000, LONGEST_RETRY_MS = 15000, ENDED_RETRY_MS = 20000;
  var state = "connecting", last = null, heard = Date.now(), failed = false, isWaiting = false, again = function () {};

  remote.hasLost = function () { return state === "connecting" || state === "reconnecting"; };
  remote.isLive = function () { return state === "live"; };

  // --- state of this page ---

  function enter(next) {
    state = next;
    if (next !== "live") last = null;  // the page may have changed since: refresh once it is live again
    show();
  }
  function show() {
    var isOffline = state === "reconnecting" && (!navigator.onLine || failed);
    remote.showState(isOffline ? "offline" : state === "live" && isWaiting ? "waiting" : state);
  }
  function lose() {
    if (state === "live" || state === "connecting") enter("reconnecting");
  }
  function take(told) {
    heard = Date.now();
    enter("live");
    failed = false;
    remote.showTrouble(told.trouble);
    if (told.version === last) return;
    last = told.version;
    remote.refresh();
    remote.tell("change", last);
  }
  // The server responded that the user is signed out or has no access.
  function end(status) {
    enter(status === 401 ? "ended" : "denied");
    if (status === 401 && remote.signIn) remote.showTrouble("You are signed out.", remote.signIn());
    else remote.showTrouble("This board is no longer available: it was closed, or you have lost access.");
  }

  // A request failed while the stream is lost, so the server cannot be reached.
  remote.on("answer", function (status) {
    failed = state !== "live" && (status === 0 || status >= 500);
    // The open stream was admitted earlier: reconnect with the present rights.
    if (state === "live" && (status === 401 || status === 403)) again();
    if (status === 401) end(status);
    if (status === 200 && (state === "ended" || state === "denied")) again();  // signed in again in another tab
    show();
  });
  remote.on("waiting", function (is) {
    isWaiting = is;
    show();
  });
  window.addEventListener("online", show);
  window.addEventListener("offline", show);

  // The connection, or the page that listens for this one, may be dead without notice. Uses the wall clock, because timers
  // stop while a machine sleeps.
  function check() {
    if (state !== "live" || Date.now() - heard < SILENCE_MS) return;
    lose();
    again();
  }
  window.setInterval(check, CHECK_MS);
  document.addEventListener("visibilitychange", check);

  // --- one page listens for all pages of this browser ---

  // A browser has six connections per host, which requests need. When the listening page is closed, another replaces it. A
  // new page requests the last event with an empty message.
  function listen(pass) {
    var source = null, next = 0, delay = FIRST_RETRY_MS;
    function hear(what) {
      if (what.told) delay = FIRST_RETRY_MS;
      act(what);
      pass(what);
    }
    function connect() {
      window.clearTimeout(next);
      if (source) source.close();
      source = new EventSource(remote.url("remote/events"));
      ["position", "change", "reset"].forEach(function (kind) {
        source.addEventListener(kind, function (event) {
          hear({ told: { version: event.lastEventId, trouble: JSON.parse(event.data).trouble || "" } });
        });
      });
      source.onerror = function () {
        hear({ lost: true });
        if (source.readyState === EventSource.CLOSED) askWhy();  // otherwise the browser reconnects
      };
    }
    function reconnect() {
      hear({ lost: true });
      connect();
    }
    async function askWhy() {
      var answer = await window.fetch("/api/config").catch(function () { return { status: 0 }; });
      var isEnded = answer.status === 401 || answer.status === 403 || answer.status === 404;
      if (isEnded) hear({ ended: answer.status });
      next = window.setTimeout(connect, isEnded ? ENDED_RETRY_MS : delay * (0.5 + Math.random()));
      delay = Math.min(2 * delay, LONGEST_RETRY_MS);
    }
    connect();
    again = reconnect;
    window.addEventListener("online", reconnect);
  }
  function act(what) {
    if (what.told) take(what.told);
    else if (what.ended) end(what.ended);
    else lose();
  }

  if (!window.EventSource) return;
  if (!navigator.locks || !window.BroadcastChannel) { listen(function () {}); return; }
  var name = "remote-events " + remote.url("remote/events");
  var channel = new BroadcastChannel(name), latest = null;
  channel.onmessage = function (message) {
    if (message.data && message.data.again) again();
    else if (message.data) act(message.data);
    else if (latest) channel.postMessage(latest);
  };
  again = function () { channel.postMessage({ again: true }); };
  channel.postMessage(null);
  navigator.locks.request(name, function () {
    listen(function (what) { latest = what; channel.postMessage(what); });
    return new Promise(function () {});  // held while the page is open
  });
})(window.latticeRemote);
