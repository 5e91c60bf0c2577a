"""What helps: balanced losses and imperfect images, measured on two small models; see README.md."""
