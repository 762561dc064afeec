"""The pages of the site that are made from the code; needs no MkDocs, and hooks.py hands them to the build."""
