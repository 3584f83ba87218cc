"""What `qwenvl demo` does: the shipped model answers the bundled questions, on a page and on a contact sheet."""
