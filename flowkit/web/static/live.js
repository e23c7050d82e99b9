// Looks again every few seconds and exchanges what has changed, so that open details and the place on the page stay.
// Without scripts the page loads itself anew instead; see overview.html.
(() => {
  const pause = Number(document.currentScript.dataset.seconds) * 1000;
  const part = (page, name) => page.querySelector(`[data-live="${name}"]`);

  // The heading of open details keeps the focus when it is exchanged; nothing else is taken away under somebody's hands.
  const heading = () => document.activeElement.closest("summary")?.parentElement.id;

  const busy = () => {
    const within = part(document, "main").contains(document.activeElement) && !heading();
    return document.hidden || within || !getSelection().isCollapsed;
  };

  const exchange = (fresh, name) => {
    const old = part(document, name);
    const focused = heading();
    const open = [...old.querySelectorAll("details[open][id]")].map((details) => details.id);
    old.replaceWith(part(fresh, name));
    for (const id of open) {
      const details = document.getElementById(id);
      if (details) details.open = true;
    }
    if (focused) document.getElementById(focused)?.querySelector("summary").focus({ preventScroll: true });
  };

  const look = async () => {
    let told = "";
    if (!busy()) {
      try {
        const answer = await fetch(location.href, { redirect: "error" });
        if (!answer.ok) throw new Error(answer.status);
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        if (!busy()) for (const name of ["state", "main"]) exchange(fresh, name);
      } catch (error) {
        told = `· flowkit web does not answer since ${new Date().toLocaleTimeString()}`;
      }
    }
    const status = part(document, "status");
    if (!told || !status.textContent) status.textContent = told;
    setTimeout(look, pause);
  };

  setTimeout(look, pause);
})();
