"""Where each guest byte lives in an image."""
