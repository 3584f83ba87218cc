"""The demo model's domain: procedurally drawn images, and the questions and answers about them."""
