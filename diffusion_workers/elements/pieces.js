/**
 * Send a file from the browser to Python in pieces, since a notebook server cuts the connection at messages of more
 * than 10 MB.
 */

const PIECE = 2 ** 20;

/** Python answers each piece: a kernel may handle messages on several threads, which do not keep their order. */
function answered(model, token) {
  return new Promise((resolve) => {
    const listen = (message) => {
      if (message.kind !== "received" || message.token !== token) return;
      model.off("msg:custom", listen);
      resolve();
    };
    model.on("msg:custom", listen);
  });
}

async function sendPieces(model, file) {
  const count = Math.max(1, Math.ceil(file.size / PIECE));
  for (let index = 0; index < count; index += 1) {
    const piece = await file.slice(index * PIECE, (index + 1) * PIECE).arrayBuffer();
    const token = `${Math.random()}`;
    const received = answered(model, token);
    model.send({ kind: "piece", index, count, token, name: file.name }, undefined, [new DataView(piece)]);
    await received;
  }
}

/** The error message for a file that is too large to send; otherwise empty. */
function tooLarge(file, maxBytes) {
  if (file.size <= maxBytes) return "";
  return (
    `${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MB; ` +
    `at most ${maxBytes / 2 ** 20} MB are accepted; save it smaller`
  );
}
