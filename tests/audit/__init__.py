"""What is known of the packages that serving needs: pip-audit over the installed ones and over the lowest that are allowed."""
