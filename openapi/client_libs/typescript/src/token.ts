/** Why a secret cannot be sent in a header, without repeating it; undefined if it can. */
export function tokenProblem(secret: string): string | undefined {
  const at = [...secret].findIndex((character) => character < '!' || character > '~');
  if (at < 0) return undefined;
  const codePoint = [...secret][at]?.codePointAt(0)?.toString(16).toUpperCase().padStart(4, '0');
  return `character ${at + 1} (U+${codePoint}) cannot be sent in a header; allowed: visible ASCII characters; copy it again`;
}

/** The Authorization header for a secret; throws a RangeError with the field and the position of an invalid character. */
export function bearer(secret: string, field: string): { Authorization: string } {
  const trimmed = secret.trim();
  const problem = tokenProblem(trimmed);
  if (problem !== undefined) throw new RangeError(`${field}: ${problem}`);
  return { Authorization: `Bearer ${trimmed}` };
}
