/** The X/Y grid: two parameters, their values, and a table of images. */
import { useState } from 'preact/hooks';
import { addressOf, select } from './gallery';
import {
  choicesOf,
  grid,
  gridRunning,
  gridSheet,
  parameters,
  parseValues,
  runGrid,
  shownValue,
  stopGrid,
  type Axis,
  type Cell,
  type Parameter,
} from './grid';
import { showErrors } from './errors';
import { form, itemAt, status } from './state';

interface Entry {
  path: string;
  text: string;
}

const HINTS = {
  integer: '10, 20, 30 or 10:30:10',
  number: '1, 1.5, 3 or 1:3:0.5',
  boolean: 'true, false',
  choice: 'names with commas',
  text: 'one value a line',
} as const;

function AxisEntry({
  name,
  entry,
  all,
  problem,
  change,
}: {
  name: string;
  entry: Entry;
  all: Parameter[];
  problem: string;
  change: (entry: Entry) => void;
}) {
  const parameter = all.find(({ path }) => path === entry.path);
  const choices = parameter ? choicesOf(parameter) : [];
  const hint = parameter && parameter.field.kind in HINTS ? HINTS[parameter.field.kind as keyof typeof HINTS] : '';
  const choose = (path: string) => {
    const chosen = all.find((other) => other.path === path);
    change({ path, text: chosen ? choicesOf(chosen).join(', ') : '' });
  };
  return (
    <fieldset class={`axis${problem ? ' wrong' : ''}`}>
      <legend>{name}</legend>
      <select
        aria-label={`Parameter of the ${name}`}
        value={entry.path}
        onChange={(event) => choose(event.currentTarget.value)}
      >
        {all.map(({ path, title }) => (
          <option key={path} value={path}>
            {title}
          </option>
        ))}
      </select>
      <textarea
        rows={parameter?.field.kind === 'text' && !choices.length ? 3 : 1}
        aria-label={`Values of the ${name}`}
        aria-invalid={problem !== ''}
        placeholder={hint}
        value={entry.text}
        spellcheck={false}
        onInput={(event) => change({ ...entry, text: event.currentTarget.value })}
      />
      {problem && (
        <ul class="errors" role="alert">
          <li>{problem}</li>
        </ul>
      )}
    </fieldset>
  );
}

function CellView({ cell, name }: { cell: Cell | undefined; name: string }) {
  const item = cell?.itemId ? itemAt(cell.itemId) : undefined;
  if (item)
    return (
      <button type="button" class="cell" onClick={() => select(item.id)} aria-label={`Show ${name}`}>
        <img src={addressOf(item)} alt={name} />
      </button>
    );
  const text =
    cell?.state === 'failed'
      ? (cell.error ?? 'failed')
      : cell?.state === 'running'
        ? '…'
        : cell?.state === 'done'
          ? 'deleted'
          : '';
  return (
    <span class={`cell ${cell?.state ?? ''}`} aria-busy={cell?.state === 'running'}>
      {text}
    </span>
  );
}

function Table() {
  const shown = grid.value;
  if (!shown)
    return (
      <p class="note">
        Choose two parameters and their values. Everything else is taken from the form, with one seed for all.
      </p>
    );
  const { x, y, cells } = shown;
  return (
    <div class="grid-scroll" tabIndex={0} role="region" aria-label="Grid of images">
      <table class="grid">
        <thead>
          <tr>
            <th scope="col" class="corner">
              {y.path} \ {x.path}
            </th>
            {x.values.map((value) => (
              <th scope="col" key={shownValue(value)}>
                {shownValue(value)}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {y.values.map((value, row) => (
            <tr key={shownValue(value)}>
              <th scope="row">{shownValue(value)}</th>
              {x.values.map((across, column) => (
                <td key={shownValue(across)}>
                  <CellView
                    cell={cells[row]?.[column]}
                    name={`${x.path} ${shownValue(across)}, ${y.path} ${shownValue(value)}`}
                  />
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

const entries: { x: Entry; y: Entry } = {
  x: { path: 'num_inference_steps', text: '5, 10, 25' },
  y: { path: 'guidance_scale', text: '1, 1.5, 3' },
};

export function GridView() {
  const all = parameters();
  const [x, setX] = useState(entries.x);
  const [y, setY] = useState(entries.y);
  const [problems, setProblems] = useState({ x: '', y: '' });
  const axis = (entry: Entry): Axis => {
    const parameter = all.find(({ path }) => path === entry.path);
    if (!parameter) throw new Error('this parameter is not in the form any more');
    return { path: entry.path, values: parseValues(parameter, entry.text) };
  };
  const attempt = (entry: Entry): { axis?: Axis; problem: string } => {
    try {
      return { axis: axis(entry), problem: '' };
    } catch (error) {
      return { problem: error instanceof Error ? error.message : String(error) };
    }
  };
  const run = async () => {
    const [across, down] = [attempt(x), attempt(y)];
    setProblems({
      x: across.problem,
      y: down.problem || (x.path === y.path ? 'this is the parameter of the X axis' : ''),
    });
    if (!across.axis || !down.axis || x.path === y.path) return;
    if (!String(form.value['prompt'] ?? '').trim() && ![x.path, y.path].includes('prompt'))
      return showErrors(new Error('write a prompt first'), true);
    try {
      await runGrid(across.axis, down.axis);
    } catch (error) {
      setProblems({ x: error instanceof Error ? error.message : String(error), y: '' });
    }
  };
  const save = async () => {
    if (!grid.value) return;
    const link = document.createElement('a');
    link.href = URL.createObjectURL(await gridSheet(grid.value));
    link.download = 'grid.png';
    link.click();
    URL.revokeObjectURL(link.href);
    status.value = 'The grid is saved.';
  };
  const cells = grid.value?.cells.flat() ?? [];
  const ready = cells.filter(({ state }) => state === 'done' || state === 'failed').length;
  return (
    <div class="grid-view">
      <div class="axes">
        <AxisEntry
          name="X axis"
          entry={x}
          all={all}
          problem={problems.x}
          change={(entry) => setX((entries.x = entry))}
        />
        <AxisEntry
          name="Y axis"
          entry={y}
          all={all}
          problem={problems.y}
          change={(entry) => setY((entries.y = entry))}
        />
      </div>
      <div class="actions">
        {gridRunning.value ? (
          <button type="button" onClick={stopGrid}>
            Stop the grid <kbd>Esc</kbd>
          </button>
        ) : (
          <button type="button" class="primary" onClick={() => void run()}>
            Make the grid
          </button>
        )}
        {cells.length > 0 && !gridRunning.value && (
          <button type="button" onClick={() => void save()}>
            Save as one image
          </button>
        )}
        {gridRunning.value && (
          <>
            <progress aria-label="Progress of the grid" value={ready} max={cells.length} />
            <span class="note">
              {ready} of {cells.length}
            </span>
          </>
        )}
      </div>
      <Table />
    </div>
  );
}
