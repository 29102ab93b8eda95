"""How bytes travel to where they are kept."""
