"""The world of the demo model: pictures drawn by a program, and everything that can be asked about them."""
