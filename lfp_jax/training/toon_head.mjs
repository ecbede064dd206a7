// Renders the training pictures of the bundled demo generators: faces of the DiceBear style
// "toon-head" (design by Johan Melin, CC BY 4.0), SIZE x SIZE opaque RGB PNGs with true labels.
//
//   npm install --prefix BUILD_DIR (with the package.json beside this file), then
//   node toon_head.mjs --out DIR [--count 56000] [--size 64] [--seed 0]
//
// Every option is drawn here, not by DiceBear, so labels.jsonl says exactly what is on a picture.
// Face i depends on (seed, i) only; files that exist are kept, so a killed run goes on. Every tenth
// face (index 9, 19, ...) is held out.

import fs from 'node:fs';
import path from 'node:path';
import { createAvatar } from '@dicebear/core';
import * as toonHead from '@dicebear/toon-head';
import { Resvg } from '@resvg/resvg-js';

const USAGE = 'usage: node toon_head.mjs --out DIR [--count 56000] [--size 64] [--seed 0]';
const FOLDER_SIZE = 1000;
const BACKGROUNDS = [
  'b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf', 'f4f1de',
  'a8dadc', '95d5b2', 'ffe066', 'f28482', '84a59d', '6c757d',
];

const defaults = (name) => toonHead.schema.properties[name].default;
const CHOICES = {
  skin: defaults('skinColor'),
  hair_color: defaults('hairColor'),
  hair: defaults('hair'),
  rear_hair: ['none', ...defaults('rearHair')],
  eyes: defaults('eyes'),
  eyebrows: defaults('eyebrows'),
  mouth: defaults('mouth'),
  beard: ['none', ...defaults('beard')],
  clothes: defaults('clothes'),
  clothes_color: defaults('clothesColor'),
  background: BACKGROUNDS,
};

function parseArguments(argv) {
  const options = { out: null, count: 56000, size: 64, seed: 0 };
  for (let i = 0; i < argv.length; i += 2) {
    const name = argv[i].replace(/^--/, '');
    if (!(name in options) || argv[i + 1] === undefined) throw new Error(USAGE);
    options[name] = name === 'out' ? argv[i + 1] : Number(argv[i + 1]);
  }
  const whole = ['count', 'size', 'seed'].every((n) => Number.isInteger(options[n]));
  if (!options.out || !whole || options.count < 1 || options.size < 8) throw new Error(USAGE);
  return options;
}

// mulberry32: a 32-bit generator, enough to draw eleven independent choices an image.
function randomStream(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function drawLabels(seed, index) {
  const random = randomStream(Math.imul(seed + 1, 0x9e3779b1) ^ Math.imul(index + 1, 0x85ebca6b));
  for (let i = 0; i < 4; i++) random(); // neighbouring seeds need a few rounds to part
  const pick = (name) => Math.floor(random() * CHOICES[name].length);
  const labels = Object.fromEntries(Object.keys(CHOICES).map((name) => [name, pick(name)]));
  if (random() < 0.5) labels.beard = 0; // half of the faces have no beard
  return labels;
}

function render(labels, size) {
  const value = (name) => CHOICES[name][labels[name]];
  const svg = createAvatar(toonHead, {
    seed: 'lfp',
    skinColor: [value('skin')],
    hairColor: [value('hair_color')],
    hair: [value('hair')],
    rearHair: labels.rear_hair ? [value('rear_hair')] : [],
    rearHairProbability: labels.rear_hair ? 100 : 0,
    eyes: [value('eyes')],
    eyebrows: [value('eyebrows')],
    mouth: [value('mouth')],
    beard: labels.beard ? [value('beard')] : [],
    beardProbability: labels.beard ? 100 : 0,
    clothes: [value('clothes')],
    clothesColor: [value('clothes_color')],
    backgroundColor: [value('background')],
  }).toString();
  return new Resvg(svg, { fitTo: { mode: 'width', value: size } }).render().asPng();
}

function fileOf(index) {
  const folder = String(Math.floor(index / FOLDER_SIZE)).padStart(3, '0');
  return path.join('images', folder, `${String(index).padStart(6, '0')}.png`);
}

function writeAtomically(target, data) {
  fs.writeFileSync(`${target}.tmp`, data);
  fs.renameSync(`${target}.tmp`, target);
}

// Kept pictures of another seed or size would get the wrong labels.
function claimFolder(out, settings) {
  const target = path.join(out, 'settings.json');
  const text = JSON.stringify(settings);
  fs.mkdirSync(out, { recursive: true });
  if (!fs.existsSync(target)) writeAtomically(target, text);
  const found = fs.readFileSync(target, 'utf8');
  if (found !== text) throw new Error(`'${out}' holds faces of ${found}; asked for ${text}`);
}

function main() {
  const { out, count, size, seed } = parseArguments(process.argv.slice(2));
  claimFolder(out, { style: 'toon-head', size, seed });
  const rows = [];
  const start = Date.now();
  for (let index = 0; index < count; index++) {
    const file = fileOf(index);
    const target = path.join(out, file);
    const labels = drawLabels(seed, index);
    const split = index % 10 === 9 ? 'held_out' : 'train';
    rows.push(JSON.stringify({ file, split, labels }));
    if (index % FOLDER_SIZE === 0) fs.mkdirSync(path.dirname(target), { recursive: true });
    if (!fs.existsSync(target)) writeAtomically(target, render(labels, size));
    if (index % FOLDER_SIZE === FOLDER_SIZE - 1) {
      const rate = (index + 1) / ((Date.now() - start) / 1000);
      const left = Math.round((count - index - 1) / rate);
      process.stderr.write(`${index + 1}/${count} faces, ${rate.toFixed(0)} a second, ${left} s left\n`);
    }
  }
  writeAtomically(path.join(out, 'choices.json'), JSON.stringify(CHOICES, null, 1));
  // Written last: a folder with labels.jsonl is complete.
  writeAtomically(path.join(out, 'labels.jsonl'), rows.join('\n') + '\n');
}

try {
  main();
} catch (error) {
  process.stderr.write(`toon_head: ${error.message}\n`);
  process.exit(2);
}
