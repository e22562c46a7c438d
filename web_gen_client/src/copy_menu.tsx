/** Buttons of a menu that put the request on the clipboard. */
import { codeOf, copy, type Language } from './code';
import { status } from './state';
import type { JsonObject } from './paths';

const LANGUAGES: [Language, string][] = [
  ['python', 'Python'],
  ['curl', 'curl'],
  ['json', 'JSON'],
];

interface Source {
  form: JsonObject;
  lockSeed: boolean;
}

export function copyButtons(source: () => Source | Promise<Source>) {
  const put = async (language: Language, name: string) => {
    const { form, lockSeed } = await source();
    await copy(codeOf(form, language, lockSeed));
    status.value = `Copied as ${name}.`;
  };
  return LANGUAGES.map(([language, name]) => (
    <button type="button" key={language} onClick={() => void put(language, name)}>
      Copy as {name}
    </button>
  ));
}
