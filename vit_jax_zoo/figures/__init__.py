"""Functions that turn arrays into matplotlib figures; they neither show nor save them."""
