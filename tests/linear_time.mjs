// Prints the patterns of TypeScript sources, as JSON: every regular expression with its place, and for those that a
// sample is given for, the first text on which matching takes more than linear time.
//
//     node tests/linear_time.mjs TYPESCRIPT_MODULE samples.json FILE...
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const [typescript, samplesFile, ...files] = process.argv.slice(2);
const { default: ts } = await import(pathToFileURL(typescript).href);
const samples = JSON.parse(readFileSync(samplesFile, 'utf8'));
const SHORT = 2000;
const FACTOR = 8;
const SLOWER = 3; // times the factor that a longer text may take, for the noise of a shared machine
const NOISE_MS = 0.5;
const UNITS = [' ', 'a', '1', '/', '.', '[', ']', ',', ':', ';', '_', '-', '\n', 'é', 'a.', 'a[', '[1', ' a', '/a', ',\n'];

function patterns(file) {
  const kind = file.endsWith('x') ? ts.ScriptKind.TSX : ts.ScriptKind.TS;
  const source = ts.createSourceFile(file, readFileSync(file, 'utf8'), ts.ScriptTarget.Latest, true, kind);
  const found = [];
  const visit = (node) => {
    if (ts.isRegularExpressionLiteral(node)) found.push(node.text);
    if ((ts.isNewExpression(node) || ts.isCallExpression(node)) && node.expression.getText() === 'RegExp')
      found.push(node.getText());
    ts.forEachChild(node, visit);
  };
  visit(source);
  return found;
}

function milliseconds(pattern, text, rounds) {
  let best = Infinity;
  for (let round = 0; round < rounds; round++) {
    const before = process.cpuUsage();
    if (pattern.global) for (const _ of text.matchAll(pattern));
    else pattern.exec(text);
    const { user, system } = process.cpuUsage(before);
    best = Math.min(best, (user + system) / 1000);
  }
  return best;
}

function grows(pattern, build) {
  for (const rounds of [1, 3, 7]) {
    const before = milliseconds(pattern, build(SHORT), rounds);
    if (milliseconds(pattern, build(SHORT * FACTOR), rounds) <= SLOWER * FACTOR * before + NOISE_MS) return false;
  }
  return true;
}

function slowText(literal, sample) {
  const end = literal.lastIndexOf('/');
  const pattern = new RegExp(literal.slice(1, end), literal.slice(end + 1));
  if (!sample.match(pattern)) return `the sample ${JSON.stringify(sample)} does not match`;
  const starts = Array.from({ length: sample.length + 1 }, (_, cut) => sample.slice(0, cut));
  for (const start of starts)
    for (const unit of [...UNITS, sample]) {
      const build = (length) => start + unit.repeat(Math.ceil(length / unit.length)) + '\0';
      if (grows(pattern, build)) return `${JSON.stringify(start)} + ${JSON.stringify(unit)} * n`;
    }
  return null;
}

const found = [...new Set(files.flatMap(patterns))];
const slow = {};
for (const literal of found) {
  if (!(literal in samples)) continue;
  const text = slowText(literal, samples[literal]);
  if (text) slow[literal] = text;
}
console.log(JSON.stringify({ found, slow }));
