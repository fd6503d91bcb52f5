// Plan and notes of a task, edited in the page, where lattice's page would have an editor started on its server's machine.
//
// A text is saved with the text that it was made from: what others have changed in other lines is merged on the server,
// what they have changed in the same lines is shown. What was typed is kept until it is saved or thrown away knowingly:
// also while the page is loaded anew.
(function (remote) {
  "use strict";
  var WORDS = { plans: "Plan", notes: "Notes" };
  var SAVED = "Saved.", MERGED = "Saved, with what somebody else has changed in other lines.";
  var OPEN = /^\/api\/tasks\/([^/?]+)\/open-(plans|notes)\/?(?:\?|$)/;

  remote.instead.push(function (path, method) {
    var asked = OPEN.exec(path);
    if (method !== "POST" || !asked) return null;
    open(asked[1], asked[2]);
    return Promise.resolve(new Response('{"ok": true, "data": {}}', { headers: { "Content-Type": "application/json" } }));
  });

  // --- a text ---

  // As a text field holds it; how lines end on the server stays as it is, for the merge sees that nobody has changed it.
  function normal(text) { return text === null ? null : text.replace(/\r\n?/g, "\n"); }

  function Text(task, kind) {
    this.url = "/remote/" + kind + "/" + task;
    this.key = "lattice draft " + remote.url(this.url);
    this.base = null;      // what this was made from; null: there were none
    this.text = "";        // what stands in the field
    this.theirs = undefined;  // what is on the server, in a conflict with this
    this.aside = null;     // what stood here before theirs was taken
    this.isLoaded = false;
    this.locked = "";      // why it can't be edited, if so
    this.said = "";
    this.isBad = false;
    this.isSaving = false;
  }
  Text.prototype.isDirty = function () { return this.text !== (this.base || "") || this.theirs !== undefined; };
  Text.prototype.say = function (said, isBad) { this.said = said; this.isBad = Boolean(isBad); };

  Text.prototype.keep = function () {
    if (!this.isLoaded) return;
    try {
      if (!this.isDirty() && this.aside === null) sessionStorage.removeItem(this.key);
      else sessionStorage.setItem(this.key, JSON.stringify({ base: this.base, text: this.text, aside: this.aside }));
    } catch (error) { /* no room: it is here as long as the page is */ }
  };
  Text.prototype.kept = function () {
    try { return JSON.parse(sessionStorage.getItem(this.key)); } catch (error) { return null; }
  };

  Text.prototype.load = async function () {
    var now = await ask(this.url);
    var text = normal(now.text), kept = this.kept();
    this.isLoaded = true;
    this.locked = now.editable ? "" : now.reason;
    this.base = text;
    this.text = text || "";
    this.say("");
    if (kept) {
      this.base = kept.base;
      this.text = kept.text;
      this.aside = kept.aside;
      if (this.isDirty()) this.say("This is what you had typed and not saved.");
    }
  };

  Text.prototype.type = function (text) {
    this.text = text;
    if (this.said === SAVED || this.said === MERGED) this.say("");
    this.keep();
  };

  // Somebody has changed something: show it where nothing was typed, say it where there was.
  Text.prototype.look = async function () {
    if (!this.isLoaded) return this.load();
    if (this.isSaving || this.theirs !== undefined) return;
    var wasDirty = this.isDirty(), base = this.base, now = await ask(this.url), text = normal(now.text);
    if (this.isSaving || this.base !== base || this.isDirty() !== wasDirty) return;
    this.locked = now.editable ? "" : now.reason;
    if (text === base) return;
    if (wasDirty) {
      this.say("Somebody else has changed this meanwhile. Their lines and yours are put together when you save.");
      return;
    }
    this.base = text;
    this.text = text || "";
    this.say("Changed by somebody else just now.");
  };

  Text.prototype.save = async function () {
    var sent = this.text;
    this.isSaving = true;
    this.say("Saving …");
    try {
      this.settle(sent, await ask(this.url, { text: sent, base: this.base }));
    } catch (error) {
      this.say(error.message + " Your text is still here.", true);
    } finally {
      this.isSaving = false;
      this.keep();
    }
  };
  Text.prototype.settle = function (sent, saved) {
    var now = normal(saved.now.text);
    this.locked = saved.now.editable ? "" : saved.now.reason;
    if (saved.outcome === "conflict") {
      this.theirs = now;
      this.say(this.locked ? "This can't be saved: " + this.locked + ". Copy your text if you need it."
                           : "Somebody else has changed the same lines.", true);
      return;
    }
    this.theirs = undefined;
    this.aside = null;
    if (this.text === sent) this.base = this.text = now || "";
    else this.base = sent;  // typed on meanwhile: what others have written is merged with the next save
    this.say(saved.outcome === "merged" && now !== sent ? MERGED : SAVED);
  };
  Text.prototype.putOver = function () {
    this.base = this.theirs;
    this.theirs = undefined;
    return this.save();
  };
  Text.prototype.takeTheirs = function () {
    this.aside = this.text;
    this.base = this.theirs;
    this.text = this.theirs || "";
    this.theirs = undefined;
    this.say("This is the text on the server.");
    this.keep();
  };
  Text.prototype.takeBack = function () {
    this.text = this.aside;
    this.aside = null;
    this.say("");
    this.keep();
  };
  // Puts an earlier version into the field; saving makes it the newest.
  Text.prototype.takeVersion = async function (version) {
    var found = await ask(this.url + "/versions/" + version.change);
    if (this.aside === null && this.text !== (this.base || "")) this.aside = this.text;
    this.text = normal(found.text) || "";
    this.say("The text of " + when(version) + " by " + version.actor + ". Save to restore it.");
    this.keep();
  };
  Text.prototype.forget = function () {
    this.text = this.base || "";
    this.theirs = undefined;
    this.aside = null;
    this.keep();
  };

  async function ask(url, body) {
    var answer, envelope = null;
    try {
      answer = await window.fetch(url, body && {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body)
      });
    } catch (error) {
      throw new Error("The server can't be reached.");
    }
    try { envelope = await answer.json(); } catch (error) { /* said below */ }
    if (envelope && envelope.ok) return envelope.data;
    if (answer.status === 401) throw new Error("You are signed out: sign in in another tab, then try again.");
    throw new Error("The server says: " + ((envelope && envelope.error && envelope.error.message) || answer.status) + ".");
  }

  function when(version) { return new Date(version.time).toLocaleString(); }

  // --- the dialog ---

  var dialog = null, parts = {}, texts = {}, kind = "plans";

  function make(tag, name, content) {
    var part = document.createElement(tag);
    if (name) { parts[name] = part; part.className = "remote-" + name; }
    if (content) part.append.apply(part, [].concat(content));
    return part;
  }
  function button(name, label, does) {
    var made = make("button", name, label);
    made.type = "button";
    made.className += " btn";
    made.addEventListener("click", does);
    return made;
  }
  function build() {
    var heading = make("h2", "heading");
    heading.id = "remote-editor-heading";
    var tabs = make("div", "tabs", Object.keys(WORDS).map(function (each) {
      return button("tab-" + each, WORDS[each], function () { show(each); });
    }));
    var field = make("textarea", "field");
    field.setAttribute("aria-describedby", "remote-editor-said");
    field.addEventListener("input", function () { current().type(field.value); draw(); });
    var said = make("p", "said");
    said.id = "remote-editor-said";
    said.setAttribute("role", "status");
    var theirs = make("pre", "theirs");
    theirs.tabIndex = 0;
    var conflict = make("section", "conflict", [
      make("h3", "", "On the server"), theirs,
      make("div", "choices", [
        button("over", "Save mine over it", function () { act(current().putOver()); }),
        button("take", "Take the server’s", function () { current().takeTheirs(); fill(); })
      ]),
      make("h3", "", "Yours: edit it into what both should be, or take one of the two")
    ]);
    var versions = make("div", "versions");
    versions.setAttribute("role", "listbox");
    versions.setAttribute("aria-label", "Versions");
    dialog = make("dialog", "", [
      make("header", "", [heading, tabs, button("history", "History", showHistory), button("close", "Close", close)]),
      versions, conflict, field,
      make("footer", "", [said, button("back", "Bring my text back", function () { current().takeBack(); fill(); }),
                          button("save", "Save", save)])
    ]);
    parts.save.classList.add("btn-primary");
    parts.save.title = "Ctrl+S";
    dialog.id = "remote-editor";
    dialog.setAttribute("aria-labelledby", heading.id);
    dialog.addEventListener("keydown", press);
    dialog.addEventListener("cancel", function (event) { event.preventDefault(); close(); });
    dialog.addEventListener("close", function () { if (isDirty()) dialog.showModal(); });  // the browser insisted
    document.body.appendChild(dialog);
  }
  function press(event) {
    event.stopPropagation();  // the page has shortcuts of its own
    if ((event.ctrlKey || event.metaKey) && (event.key === "s" || event.key === "Enter")) {
      event.preventDefault();
      save();
    } else if (event.key === "Escape") {
      event.preventDefault();
      close();
    }
  }

  // --- earlier versions ---

  async function showHistory() {
    if (!parts.versions.hidden) { hideHistory(); return; }
    var text = current();
    parts.versions.replaceChildren("Loading …");
    parts.versions.hidden = false;
    parts.history.setAttribute("aria-expanded", "true");
    try {
      var found = await ask(text.url + "/versions");
      if (text === current()) listVersions(text, found);
    } catch (error) {
      hideHistory();
      text.say(error.message, true);
      draw();
    }
  }
  function listVersions(text, found) {
    var kept = found.filter(function (version) { return version.bytes !== null; });
    parts.versions.replaceChildren.apply(parts.versions, kept.map(function (version) {
      var choice = button("", when(version) + "  " + version.actor + "  " + version.bytes + " bytes", function () {
        act(text.takeVersion(version).catch(function (error) { text.say(error.message, true); }));
      });
      choice.setAttribute("role", "option");
      choice.title = version.command;
      return choice;
    }));
    if (!kept.length) parts.versions.append("No versions are kept.");
  }
  function hideHistory() {
    parts.versions.hidden = true;
    parts.history.setAttribute("aria-expanded", "false");
  }

  function current() { return texts[kind]; }
  function isEditable(text) { return text.isLoaded && !text.locked; }
  function isDirty() { return Object.values(texts).some(function (text) { return text.isDirty(); }); }

  function open(task, which) {
    if (!dialog) build();
    texts = { plans: new Text(task, "plans"), notes: new Text(task, "notes") };
    parts.heading.textContent = task;
    if (!dialog.open) dialog.showModal();
    show(which);
    load(texts.plans);
    load(texts.notes);
    ask("/api/tasks/" + task).then(function (found) {
      parts.heading.textContent = (found.short_id || task) + " " + (found.title || "");
    }, function () { /* its id stays */ });
  }
  async function load(text) {
    try { await text.load(); } catch (error) { text.say(error.message, true); }
    if (text !== current()) { draw(); return; }
    fill();
    if (isEditable(text) && window.matchMedia("(pointer: fine)").matches) parts.field.focus();  // no keyboard on a screen
  }
  function show(which) { kind = which; hideHistory(); fill(); }
  function save() {
    var text = current();
    if (isEditable(text) && !text.isSaving && text.theirs === undefined && text.isDirty()) act(text.save());
  }
  async function act(saving) {
    draw();
    await saving;
    fill();
  }
  function close() {
    if (isDirty() && !window.confirm("What you have typed is not saved. Throw it away?")) return;
    Object.values(texts).forEach(function (text) { text.forget(); });
    texts = {};
    dialog.close();
  }

  // Puts the text into the field, without moving what somebody is reading or writing.
  function fill() {
    var text = current(), field = parts.field;
    if (!text) return;
    if (field.value !== text.text) {
      var top = field.scrollTop, at = field.selectionStart;
      field.value = text.text;
      field.setSelectionRange(Math.min(at, text.text.length), Math.min(at, text.text.length));
      field.scrollTop = top;
    }
    draw();
  }
  function draw() {
    var text = current(), hasConflict = text.theirs !== undefined;
    Object.keys(WORDS).forEach(function (each) {
      var tab = parts["tab-" + each];
      tab.setAttribute("aria-pressed", String(each === kind));
      tab.textContent = WORDS[each] + (texts[each].isDirty() ? " •" : "");
    });
    parts.field.readOnly = !isEditable(text);
    parts.field.setAttribute("aria-label", WORDS[kind]);
    parts.field.placeholder = isEditable(text) ? "Nothing is written here yet." : "";
    parts.conflict.hidden = !hasConflict;
    if (hasConflict) compare(text);
    parts.history.disabled = text.isSaving || hasConflict || !isEditable(text);
    parts.over.disabled = text.isSaving || !isEditable(text);
    parts.take.disabled = text.isSaving;
    parts.back.hidden = text.aside === null;
    parts.save.hidden = hasConflict;
    parts.save.disabled = text.isSaving || !isEditable(text) || !text.isDirty();
    parts.said.classList.toggle("remote-bad", text.isBad);
    var said = status(text);
    if (parts.said.textContent !== said) parts.said.textContent = said;
  }

  function status(text) {
    if (text.isBad) return text.said;
    if (text.locked) return "Read-only: " + text.locked + "." + (text.isDirty() ? " Copy what you have typed if you need it." : "");
    return text.said || (!text.isLoaded ? "Loading …" : text.isDirty() ? "Not saved yet." : "");
  }

  // Shows the server's text with the lines marked that are not in one's own; the first of them in view when it is new.
  var compared = null;
  function compare(text) {
    var theirs = text.theirs === null ? "(the file was removed)" : text.theirs, known = JSON.stringify([text.text, theirs]);
    if (known === compared) return;
    var isNew = parts.theirs.textContent !== theirs, mine = new Set(text.text.split("\n"));
    parts.theirs.replaceChildren.apply(parts.theirs, theirs.split(/(?<=\n)/).map(function (line) {
      if (mine.has(line.replace("\n", ""))) return document.createTextNode(line);
      var mark = document.createElement("mark");
      mark.textContent = line;
      return mark;
    }));
    compared = known;
    var first = parts.theirs.querySelector("mark");
    if (isNew && first) first.scrollIntoView({ block: "center" });
  }

  // --- what happens around it ---

  var isLooking = false;
  remote.on("change", async function () {
    if (isLooking || !dialog || !dialog.open) return;
    isLooking = true;
    var looked = Object.values(texts).map(function (text) { return text.look().catch(function () {}); });
    await Promise.all(looked);
    isLooking = false;
    fill();
  });
  window.addEventListener("beforeunload", function (event) { if (isDirty()) event.preventDefault(); });
})(window.latticeRemote);
