// Shows one neuron of the JSON block at a time. Text of the corpus and the vocabulary enters the page through
// textContent alone.
"use strict";
(() => {
  const data = document.getElementById("neuron-data");
  if (!data) return;
  const cards = JSON.parse(data.textContent);
  const nameOf = ([layer, neuron]) => `${layer}.${neuron}`;
  const places = new Map(cards.map((card, place) => [nameOf(card), place]));
  const [picker, layers, neurons, previous, next, status, article] = [
    "picker", "layer", "neuron", "previous", "next", "status", "card",
  ].map((id) => document.getElementById(id));

  const element = (tag, className = "", ...children) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children); // append makes a text node of a string
    return made;
  };

  // Marks of white space are quiet, so that the words stand out.
  const spaced = (text, marks) =>
    text.split(marks).map((part, i) => (i % 2 ? element("span", "space", part.replace(" ", "·")) : part));
  const running = (text) => spaced(text, /([⏎⇥])/);
  const token = (text) => spaced(text, /([⏎⇥ ])/);

  const contexts = (lines) => {
    const list = element("ol", "contexts");
    for (const [before, trigger, after, activation] of lines) {
      const text = element("p", "", ...running(before), element("mark", "", ...running(trigger)), ...running(after));
      text.dir = "auto";
      list.append(element("li", "", element("span", "activation", activation), text));
    }
    return list;
  };

  const words = (tokens) => element("ul", "words", ...tokens.map((text) => element("li", "", ...token(text))));

  const numbers = (lines) => {
    const body = element("tbody");
    for (const [name, value, chance] of lines) {
      const head = element("th", "", name);
      head.scope = "row";
      body.append(element("tr", "", head, element("td", "", value), element("td", "muted", chance)));
    }
    const titles = ["number", "value", "null"].map((title) => {
      const head = element("th", "", title);
      head.scope = "col";
      return head;
    });
    return element("table", "numbers", element("thead", "", element("tr", "", ...titles)), body);
  };

  const titled = (title, content) => element("section", "", element("h3", "", title), content);

  const options = (select, pairs, chosen) =>
    select.replaceChildren(
      ...pairs.map(([value, text]) => {
        const option = element("option", "", text);
        option.value = value;
        option.selected = value === chosen;
        return option;
      }),
    );

  const hint = ([, neuron, lines]) => {
    const trigger = lines.length ? [...lines[0][1].replace(/[⏎⇥]/g, " ").trim()].slice(0, 16).join("") : "";
    return trigger ? `${neuron} · ${trigger}` : `${neuron}`;
  };

  let place = 0;
  const show = (at) => {
    place = at;
    const [layer, neuron, lines, promotes, suppresses, values] = cards[at];
    options(layers, [...new Set(cards.map(([l]) => l))].map((l) => [`${l}`, `${l}`]), `${layer}`);
    options(neurons, cards.filter(([l]) => l === layer).map((c) => [`${c[1]}`, hint(c)]), `${neuron}`);
    previous.disabled = at === 0;
    next.disabled = at === cards.length - 1;
    status.textContent = `Neuron ${layer}.${neuron}`;
    article.replaceChildren(
      titled("Fires on", lines.length ? contexts(lines) : element("p", "muted", "It never fired on an ordinary token.")),
      titled("Promotes", words(promotes)),
      titled("Suppresses", words(suppresses)),
      titled("Numbers", numbers(values)),
    );
  };

  // The hash is anyone's text: it is shown only where it names a neuron of this page.
  const follow = () => {
    const named = /^#(\d{1,4}\.\d{1,7})$/.exec(location.hash);
    if (!named) return;
    if (places.has(named[1])) show(places.get(named[1]));
    else status.textContent = `Neuron ${named[1]} is not on this page. Shown: ${nameOf(cards[place])}`;
    document.getElementById("browser").scrollIntoView();
  };
  const go = (at) => {
    show(at);
    history.replaceState(null, "", `#${nameOf(cards[at])}`); // unlike location.hash, it fires no hashchange
  };

  layers.addEventListener("change", () => go(cards.findIndex(([l]) => `${l}` === layers.value)));
  neurons.addEventListener("change", () => go(places.get(`${layers.value}.${neurons.value}`)));
  previous.addEventListener("click", () => go(place - 1));
  next.addEventListener("click", () => go(place + 1));
  window.addEventListener("hashchange", follow);
  picker.hidden = false;
  show(0);
  follow();
})();
