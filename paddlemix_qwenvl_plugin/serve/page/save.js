/** Hand the user a file. */

export function saveFile(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  // The browser reads it after the click: give it time before the data goes.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
