'use strict';
const root = document.documentElement, place = document.querySelector('.cards'), redraws = [];
root.dataset.ready = 0;
window.addEventListener('error', (event) => { root.dataset.error = event.message });
const make = (parent, tag, properties) => parent.appendChild(Object.assign(document.createElement(tag), properties));
const option = (id) => document.getElementById(id);
const load = async (source) => {
  if (!source) return null;
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
};

async function show(card, article, id) {
  make(article, card.group ? 'h3' : 'h2', { id, className: 'name', textContent: card.title });
  article.setAttribute('aria-labelledby', id);
  if (card.caption) make(article, 'p', { className: 'caption', textContent: card.caption });
  const left = make(article, 'div', {}), right = make(article, 'div', {});
  const canvas = make(left, 'canvas', { width: 2 * card.width, height: 2 * card.height, role: 'img' });
  const slider = make(left, 'input', { type: 'range', min: 0, max: card.times.length - 1,
                                       value: card.times.length >> 1, ariaLabel: 'Frame of ' + card.title });
  slider.hidden = card.times.length < 2;
  const list = make(left, 'ul', { hidden: !card.things.length, ariaLabel: 'What is in it' });
  for (const thing of card.things) {
    const item = make(list, 'li', {});
    make(item, 'span', { className: 'swatch' }).style.background = thing.colour;
    item.append(thing.name);
  }
  if (card.masks) option('masks').parentElement.hidden = false;
  if (card.things.some((thing) => thing.boxes)) option('boxes').parentElement.hidden = false;
  const sounds = [];
  for (const sound of card.sounds) {
    const block = make(right, 'div', { className: 'sound' });
    const name = make(block, 'p', {});
    make(name, 'span', { className: 'swatch' }).style.background = sound.colour;
    if (!(sound.seconds > 0)) { name.append('no sound'); continue }
    option('play').hidden = false;
    name.append(sound.name);
    const strip = make(block, 'div', { className: 'strip' });
    if (sound.spectrogram) make(strip, 'img', { src: sound.spectrogram, alt: 'Spectrogram of ' + sound.name });
    const needle = make(strip, 'div', { className: 'needle' });
    const audio = make(block, 'audio', { controls: true, src: sound.audio, preload: 'metadata',
                                         ariaLabel: sound.name + ' of ' + card.title });
    strip.addEventListener('click', (event) => {
      seek((event.clientX - strip.getBoundingClientRect().left) / strip.clientWidth * sound.seconds);
      audio.play();
    });
    audio.addEventListener('play', () => {
      for (const other of document.querySelectorAll('audio')) if (other !== audio) other.pause();
      follow(audio);
    });
    audio.addEventListener('seeked', () => follow(audio));
    sounds.push({ audio, needle, seconds: sound.seconds });
  }
  const seek = (time) => { for (const { audio } of sounds) audio.currentTime = time };
  const follow = (audio) => {
    let last = 0;
    while (last + 1 < card.times.length && card.times[last + 1] <= audio.currentTime) last++;
    slider.value = last;
    draw(audio.currentTime);
    if (!audio.paused) requestAnimationFrame(() => follow(audio));
  };

  const [frames, masks] = await Promise.all([load(card.frames), load(card.masks)]);
  const context = canvas.getContext('2d');
  const rows = Math.ceil(card.times.length / card.columns);
  const tile = (image, number) => {
    const w = image.width / card.columns, h = image.height / rows;
    context.drawImage(image, number % card.columns * w, Math.floor(number / card.columns) * h, w, h,
                      0, 0, canvas.width, canvas.height);
  };
  const draw = (time) => {
    const number = Number(slider.value), at = card.times[number].toFixed(2) + ' s';
    slider.setAttribute('aria-valuetext', at);
    canvas.setAttribute('aria-label', `Frame of ${card.title} at ${at}`);
    tile(frames, number);
    if (masks && option('masks').checked) {
      context.globalAlpha = 0.25;
      context.imageSmoothingEnabled = false;
      tile(masks, number);
      context.globalAlpha = 1;
      context.imageSmoothingEnabled = true;
    }
    for (const thing of option('boxes').checked ? card.things : []) {
      const box = thing.boxes && thing.boxes[number];
      if (!box) continue;
      const [x, y, right, bottom] = box.map((v, i) => v * (i % 2 ? canvas.height : canvas.width));
      context.strokeStyle = thing.colour;
      context.lineWidth = 3;
      context.setLineDash(thing.silent ? [8, 6] : []);
      context.strokeRect(x, y, right - x, bottom - y);
    }
    for (const { needle, seconds } of sounds) needle.style.left = 100 * time / seconds + '%';
  };
  slider.addEventListener('input', () => { seek(card.times[slider.value]); draw(card.times[slider.value]) });
  redraws.push(() => draw(card.times[slider.value]));
  draw(card.times[slider.value]);
  root.dataset.ready++;
}

for (const id of ['masks', 'boxes'])
  option(id).addEventListener('change', () => redraws.forEach((redraw) => redraw()));
let grid = place, group = '';
document.querySelectorAll('script.card').forEach((element, number) => {
  const card = JSON.parse(element.textContent);
  if (card.group !== group) {
    group = card.group;
    make(place.parentElement, 'h2', { textContent: group });
    grid = make(place.parentElement, 'div', { className: 'cards' });
  }
  show(card, make(grid, 'article', {}), 'card-' + number).catch((error) => { root.dataset.error = error });
});
