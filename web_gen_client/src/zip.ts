/** Writes a ZIP archive of already compressed files: each is stored as is (APPNOTE 6.3.3, method 0). */
export interface Entry {
  name: string;
  data: Uint8Array;
  date: Date;
}

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let code = byte;
  for (let bit = 0; bit < 8; bit++) code = code & 1 ? (code >>> 1) ^ 0xedb88320 : code >>> 1;
  return code >>> 0;
});

function crc32(data: Uint8Array): number {
  let code = 0xffffffff;
  for (const byte of data) code = (code >>> 8) ^ (TABLE[(code ^ byte) & 0xff] ?? 0);
  return ~code >>> 0;
}

function dosTime(date: Date): number {
  const day = ((date.getFullYear() - 1980) << 9) | ((date.getMonth() + 1) << 5) | date.getDate();
  return ((day << 16) | (date.getHours() << 11) | (date.getMinutes() << 5) | (date.getSeconds() >> 1)) >>> 0;
}

/** Fields of two and four bytes, little-endian. */
function header(...fields: [size: 2 | 4, value: number][]): Uint8Array {
  const view = new DataView(new ArrayBuffer(fields.reduce((sum, [size]) => sum + size, 0)));
  let at = 0;
  for (const [size, value] of fields) {
    if (size === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value >>> 0, true);
    at += size;
  }
  return new Uint8Array(view.buffer);
}

export function zip(entries: Entry[]): Blob {
  const parts: Uint8Array[] = [];
  const central: Uint8Array[] = [];
  let offset = 0;
  for (const { name, data, date } of entries) {
    const path = new TextEncoder().encode(name);
    const about: [2 | 4, number][] = [
      [2, 20], // version
      [2, 0x0800], // the name is UTF-8
      [2, 0], // stored
      [4, dosTime(date)],
      [4, crc32(data)],
      [4, data.length],
      [4, data.length],
      [2, path.length],
      [2, 0],
    ];
    const local = header([4, 0x04034b50], ...about);
    parts.push(local, path, data);
    central.push(header([4, 0x02014b50], [2, 20], ...about, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]), path);
    offset += local.length + path.length + data.length;
    if (offset > 0xffffffff || entries.length > 0xffff) throw new Error('a ZIP holds at most 4 GB and 65,535 files');
  }
  const size = central.reduce((sum, part) => sum + part.length, 0);
  const count = entries.length;
  const end = header([4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, size], [4, offset], [2, 0]);
  return new Blob([...parts, ...central, end] as BlobPart[], { type: 'application/zip' });
}
