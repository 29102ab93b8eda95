"""What else happens to requests on their way."""
