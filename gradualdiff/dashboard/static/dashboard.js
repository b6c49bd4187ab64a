// Keeps a page up to date: on a word from the server it fetches the page again and puts what differs
// into each element that is marked data-live. Without this script every page is whole, and still.
"use strict";

const address = document.body.dataset.changes;
const live = document.getElementById("live");
let busy = false;
let again = false;

async function refresh() {
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  try {
    do {
      again = false;
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      const text = await answer.text();
      if (answer.ok) swap(new DOMParser().parseFromString(text, "text/html"));
    } while (again);
  } catch {
    // The server is away: the stream says so, and comes back by itself.
  } finally {
    busy = false;
  }
}

function swap(page) {
  const parts = [...document.querySelectorAll("[data-live]")];
  const others = [...page.querySelectorAll("[data-live]")];
  if (parts.map((part) => part.id).join() !== others.map((part) => part.id).join()) {
    location.reload(); // another kind of page, such as one that was still being read
    return;
  }
  parts.forEach((part, index) => {
    const other = others[index];
    if (part.className !== other.className) part.className = other.className;
    if (part.innerHTML === other.innerHTML) return;
    const held = part.contains(document.activeElement) ? document.activeElement : null;
    const href = held && held.getAttribute("href");
    part.replaceChildren(...other.childNodes); // the element stays, so that a reader announces it
    if (href) part.querySelector(`[href="${CSS.escape(href)}"]`)?.focus();
  });
}

if (address) {
  const stream = new EventSource(address);
  stream.onmessage = refresh;
  stream.onopen = () => { live.textContent = "live"; };
  stream.onerror = () => { live.textContent = "not live: trying again"; };
}
