// The hosted page's header: its project, the signed-in person, links to the projects, and signing in and out.
(function (remote) {
  "use strict";
  var page = document.querySelector('meta[name="remote-page"]'), given = page ? page.dataset : {};
  var home = remote.url("../../../");
  var readsOnly = given.readsOnly !== undefined;
  if (readsOnly) document.documentElement.classList.add("remote-reads-only");
  document.addEventListener("dragstart", function (event) {
    if (readsOnly) { event.preventDefault(); event.stopPropagation(); }
  }, true);
  remote.signIn = function () {
    // A proxy may serve it below a path.
    var here = location.pathname.slice(new URL(home, location.href).pathname.length - 1) + location.hash;
    return { href: home + "sign-in?next=" + encodeURIComponent(here), text: "Sign in" };
  };
  function made(tag, id, text) {
    var element = document.createElement(tag);
    element.id = id;
    element.textContent = text;
    return element;
  }
  document.addEventListener("DOMContentLoaded", function () {
    var brand = document.querySelector(".nav-brand"), buttons = document.querySelector(".nav-right");
    if (!brand || !buttons || !page) return;
    var link = made("a", "remote-home", "Projects"), project = made("bdi", "remote-project", given.project);
    link.href = home;
    project.title = given.project;
    brand.before(link);
    brand.after(project);
    var form = made("form", "remote-sign-out", ""), person = made("bdi", "remote-person", given.person);
    form.method = "post";
    form.action = home + "sign-out";
    person.title = "Signed in as " + given.person;
    if (readsOnly) person.append(" (read only)");
    var button = made("button", "remote-sign-out-button", "Sign out");
    button.className = "btn";
    form.append(person, button);
    buttons.append(form);
  });
})(window.latticeRemote);
