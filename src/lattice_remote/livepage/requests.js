// The page requests /api/... from the server's root. These requests go below the page's own path, so that it works behind
// any proxy; their results are passed to the other scripts. Of a list that the page has, only the changes are transferred.
(function () {
  "use strict";
  var remote = window.latticeRemote = { listeners: {} };
  var base = new URL(".", location.href);
  var fetchAnywhere = window.fetch.bind(window), openAnywhere = XMLHttpRequest.prototype.open;

  // Signals between the scripts: on("name", function) and tell("name", value).
  remote.on = function (name, listener) { (remote.listeners[name] = remote.listeners[name] || []).push(listener); };
  remote.tell = function (name, what) {
    (remote.listeners[name] || []).forEach(function (listener) { listener(what); });
  };
  remote.url = function (path) { return new URL(path.replace(/^\//, ""), base).href; };
  remote.instead = [];  // handlers that may answer a request: function (path, method) -> Promise or nothing
  remote.guards = [];   // wrappers of a response's Promise

  function key() {
    return Array.from(crypto.getRandomValues(new Uint8Array(16)), function (byte) {
      return byte.toString(16).padStart(2, "0");
    }).join("");
  }
  function ours(address) {
    var url = new URL(address, base);
    if (url.origin !== base.origin || !/^\/(api|static|remote)\//.test(url.pathname)) return null;
    return url.pathname + url.search;
  }

  // --- lists ---

  var LISTS = /\/api\/(tasks|graph)$/, TAG = /^"[0-9a-f]{32}"$/, DIFFERENCE = "lattice-ranges";
  var lists = {};  // by path: the last text and its tag

  async function list(path, request) {
    var known = lists[path];
    if (known) {
      request.headers.set("If-None-Match", known.tag);
      request.headers.set("A-IM", DIFFERENCE);
    }
    var answer = await fetchAnywhere(request, { cache: "no-store" }), tag = answer.headers.get("ETag");
    if (!TAG.test(tag || "") || (answer.status !== 200 && !known)) return answer;
    if (answer.status === 200) lists[path] = { tag: tag, text: await answer.text() };
    else if (answer.status === 226) lists[path] = { tag: tag, text: (await answer.json()).reduce(apply, known.text) };
    else if (answer.status === 304) lists[path] = known;
    else return answer;
    return listed(lists[path].text);
  }
  function apply(text, step) {
    return step.map(function (part) {
      return typeof part === "string" ? part : text.slice(part[0], part[1]);
    }).join("");
  }
  function listed(text) {
    var answer = new Response(text, { headers: { "Content-Type": "application/json" } });
    answer.json = async function () { return JSON.parse(text); };  // not encoded and decoded first
    return answer;
  }

  // --- writes without a server ---

  var UNCONFIRMED = "The server cannot be reached: this change was not confirmed.";
  var TYPED = /"(title|description|tags|assigned_to)"/;

  // Lattice's page shows the message. It also closes the form of a text, so for these the request stays open: the form
  // keeps the text, and can be sent again.
  function confirmed(asked, path, init) {
    return asked.then(function (answer) {
      var isFromProxy = answer.status >= 502 && !/json/.test(answer.headers.get("Content-Type") || "");
      return isFromProxy ? unconfirmed(path, init) : answer;
    }, function () { return unconfirmed(path, init); });
  }
  function unconfirmed(path, init) {
    remote.tell("answer", 0);
    if (!/\/(update|assign)$/.test(path) || !TYPED.test(String(init && init.body))) throw new Error(UNCONFIRMED);
    window._lattice.showToast(UNCONFIRMED + " Your text is still here: save it again.", "error");
    return new Promise(function () {});
  }

  window.fetch = function (input, init) {
    var path = ours(input instanceof Request ? input.url : String(input));
    if (path === null) return fetchAnywhere(input, init);
    var method = String((init && init.method) || (input instanceof Request && input.method) || "GET").toUpperCase();
    var instead = remote.instead.reduce(function (found, answer) { return found || answer(path, method); }, null);
    if (instead) return instead;
    var address = remote.url(path);
    var request = new Request(input instanceof Request ? new Request(address, input) : address, init);
    // Browsers retry a request on a dead kept-alive connection; the key makes it run once.
    if (method !== "GET") request.headers.set("Idempotency-Key", key());
    var asked = method === "GET" && LISTS.test(path) ? list(path, request) : fetchAnywhere(request);
    if (method !== "GET") asked = confirmed(asked, path, init);
    asked.then(function (answer) { remote.tell("answer", answer.status); }, function () { remote.tell("answer", 0); });
    return remote.guards.reduce(function (promise, guard) { return guard(promise); }, asked);
  };
  XMLHttpRequest.prototype.open = function (method, address) {
    var path = ours(String(address));
    if (path !== null) arguments[1] = remote.url(path);
    return openAnywhere.apply(this, arguments);
  };
})();
