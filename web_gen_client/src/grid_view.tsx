/** The grid: up to three parameters, their values, and a table of images for each value of the third. */
import { useState } from 'preact/hooks';
import { addressOf, saveFile, select } from './gallery';
import {
  AXES,
  axisOf,
  choicesOf,
  grid,
  gridRunning,
  gridSheet,
  headingOf,
  parameters,
  REPLACE,
  runGrid,
  stopGrid,
  UNUSED,
  type Axis,
  type AxisName,
  type Cell,
  type Grid,
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
  choice: 'comma-separated names',
  text: 'one value per line',
} as const;

function AxisEntry({
  name,
  entry,
  all,
  optional,
  problem,
  change,
}: {
  name: string;
  entry: Entry;
  all: Parameter[];
  optional: boolean;
  problem: string;
  change: (entry: Entry) => void;
}) {
  const parameter = all.find(({ path }) => path === entry.path);
  const choices = parameter ? choicesOf(parameter) : [];
  const known = parameter && parameter.field.kind in HINTS ? HINTS[parameter.field.kind as keyof typeof HINTS] : '';
  const hint = entry.path === REPLACE ? 'red, green, blue: replaces the first with each' : known;
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
        {optional && <option value="">none</option>}
        {all.map(({ path, title }) => (
          <option key={path} value={path}>
            {title}
          </option>
        ))}
      </select>
      {entry.path && (
        <textarea
          rows={parameter?.field.kind === 'text' && !choices.length ? 3 : 1}
          aria-label={`Values of the ${name}`}
          aria-invalid={problem !== ''}
          placeholder={hint}
          value={entry.text}
          spellcheck={false}
          onInput={(event) => change({ ...entry, text: event.currentTarget.value })}
        />
      )}
      {problem && (
        <p class="errors" role="alert">
          {problem}
        </p>
      )}
    </fieldset>
  );
}

function CellView({ cell, name }: { cell: Cell | undefined; name: string }) {
  const item = cell?.itemId ? itemAt(cell.itemId) : undefined;
  if (item)
    return (
      <button type="button" class="cell" onClick={() => select(item.id)} aria-label={`Show ${name}`}>
        <img class={Math.max(item.width, item.height) <= 192 ? 'pixels' : ''} src={addressOf(item)} alt="" />
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

function Table({ shown, layer }: { shown: Grid; layer: number }) {
  const { x, y, z, cells } = shown;
  const name = (row: number, column: number) =>
    [headingOf(x, column), headingOf(y, row), headingOf(z, layer)].filter(Boolean).join(', ');
  return (
    <table class="grid">
      {z.path && <caption>{headingOf(z, layer)}</caption>}
      <thead>
        <tr>
          {y.path && <td />}
          {x.values.map((_, column) => (
            <th scope="col" key={headingOf(x, column)}>
              {headingOf(x, column)}
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {y.values.map((_, row) => (
          <tr key={headingOf(y, row)}>
            {y.path && <th scope="row">{headingOf(y, row)}</th>}
            {x.values.map((_, column) => (
              <td key={headingOf(x, column)}>
                <CellView cell={cells[layer]?.[row]?.[column]} name={name(row, column)} />
              </td>
            ))}
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function Tables() {
  const shown = grid.value;
  if (!shown)
    return (
      <p class="note">
        Choose up to three parameters and their values. Everything else is taken from the form, with one seed for all.
      </p>
    );
  return (
    <div class="grid-scroll" tabIndex={0} role="region" aria-label="Grid of images">
      {shown.z.values.map((_, layer) => (
        <Table key={layer} shown={shown} layer={layer} />
      ))}
    </div>
  );
}

const entries: Record<AxisName, Entry> = {
  x: { path: 'num_inference_steps', text: '5, 10, 25' },
  y: { path: 'guidance_scale', text: '1, 1.5, 3' },
  z: { path: '', text: '' },
};
const NO_PROBLEMS: Record<AxisName, string> = { x: '', y: '', z: '' };

export function GridView() {
  const all = parameters();
  const [typed, setTyped] = useState(entries);
  const [problems, setProblems] = useState(NO_PROBLEMS);
  const change = (name: AxisName, entry: Entry) => {
    entries[name] = entry;
    setTyped({ ...entries });
  };
  /** The parsed axis, or an error message. */
  const attempt = (name: AxisName): Axis | string => {
    const { path, text } = typed[name];
    if (!path) return UNUSED;
    const same = AXES.slice(0, AXES.indexOf(name)).find((other) => typed[other].path === path);
    if (same) return `this is the parameter of the ${same.toUpperCase()} axis`;
    const parameter = all.find((other) => other.path === path);
    if (!parameter) return 'this parameter is not in the form any more';
    try {
      return axisOf(parameter, text);
    } catch (error) {
      return error instanceof Error ? error.message : String(error);
    }
  };
  const run = async () => {
    const [x, y, z] = [attempt('x'), attempt('y'), attempt('z')];
    const problem = (axis: Axis | string) => (typeof axis === 'string' ? axis : '');
    setProblems({ x: problem(x), y: problem(y), z: problem(z) });
    if (typeof x === 'string' || typeof y === 'string' || typeof z === 'string') return;
    if (!String(form.value['prompt'] ?? '').trim() && !AXES.some((name) => typed[name].path === 'prompt'))
      return showErrors(new Error('write a prompt first'), true);
    try {
      await runGrid({ x, y, z });
    } catch (error) {
      setProblems({ ...NO_PROBLEMS, x: error instanceof Error ? error.message : String(error) });
    }
  };
  const save = async () => {
    if (!grid.value) return;
    saveFile(await gridSheet(grid.value), 'grid.png');
    status.value = 'The grid is saved.';
  };
  const cells = grid.value?.cells.flat(2) ?? [];
  const ready = cells.filter(({ state }) => state === 'done' || state === 'failed').length;
  return (
    <div class="grid-view">
      <div class="axes">
        {AXES.map((name) => (
          <AxisEntry
            key={name}
            name={`${name.toUpperCase()} axis`}
            entry={typed[name]}
            all={all}
            optional={name !== 'x'}
            problem={problems[name]}
            change={(entry) => change(name, entry)}
          />
        ))}
      </div>
      <div class="actions">
        {gridRunning.value ? (
          <button type="button" onClick={stopGrid}>
            Stop the grid <kbd>Esc</kbd>
          </button>
        ) : (
          <button type="button" class="primary" onClick={() => void run()}>
            Generate grid
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
      <Tables />
    </div>
  );
}
