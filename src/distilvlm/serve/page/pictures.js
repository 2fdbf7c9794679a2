// Pictures: read from files, made smaller where they are huge, kept in the browser while their conversation is.

import { Problem } from "./api.js";

const LONGEST = 1536; // pixels: several times what any tower's canvas has
const LARGEST = 3_000_000; // bytes of a file that travels as it is
const AS_THEY_ARE = ["image/jpeg", "image/png", "image/webp"];

/** A file → `{id, blob, url, width, height, alt}`, upright. */
export async function read(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Problem(`This browser can't read ${file.name || "that"} as a picture.`);
  });
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const kept = scale === 1 && file.size <= LARGEST && AS_THEY_ARE.includes(file.type);
  const blob = kept ? file : await redrawn(bitmap, scale);
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  bitmap.close();
  const alt = file.name ? file.name.replace(/\.\w+$/, "") : "pasted picture";
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), blob, url: URL.createObjectURL(blob), width, height, alt };
}

async function redrawn(bitmap, scale) {
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; // JPEG has no transparency, and the server puts white behind it, too
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
}

/** As the API takes it. */
export function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Keep a picture over a reload. */
export async function keep({ id, blob }) {
  await inStore("readwrite", (store) => store.put(blob, id));
}

/** The kept picture of a description `{id, ...}`, or null where the browser has thrown it away. */
export async function kept(described) {
  const blob = await inStore("readonly", (store) => store.get(described.id));
  return blob ? { ...described, blob, url: URL.createObjectURL(blob) } : null;
}

/** Forget all kept pictures but these. */
export async function forgetAllBut(ids) {
  const all = await inStore("readonly", (store) => store.getAllKeys());
  for (const id of all) if (!ids.has(id)) await inStore("readwrite", (store) => store.delete(id));
}

let opened;

async function inStore(mode, act) {
  opened ??= settled(Object.assign(indexedDB.open("distilvlm", 1), { onupgradeneeded: ({ target }) => target.result.createObjectStore("pictures") }));
  const database = await opened;
  return settled(act(database.transaction("pictures", mode).objectStore("pictures")));
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
