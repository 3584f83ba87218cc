/** Download of generated files. */

/** Save a blob as a file in the browser's download folder. */
export function saveFile(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  // The browser reads the data some time after the click.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
