// The embedded data: gzip in base64, unpacked when needed.
async function unpack(name) {
  const packed = atob(byId(`data-${name}`).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const opened = new Map(); // the tokens of the last few blocks, by the block's index

async function tokensOf(row, perBlock) {
  const number = Math.floor(row / perBlock);
  if (!opened.has(number)) {
    opened.set(number, unpack(`tokens-${number}`));
    if (opened.size > 8) opened.delete(opened.keys().next().value);
  }
  const { lengths, mask, logprobs, turns } = (await opened.get(number))[row % perBlock];
  const trained = [];
  mask.forEach((length, i) => {
    for (let n = 0; n < length; n++) trained.push(i % 2 === 1);
  });
  return { lengths, trained, logprobs, turns };
}
