"""One engine moves all guest data: formats answer questions about addresses, it does the rest."""
