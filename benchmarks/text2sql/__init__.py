"""What the text-to-SQL agent is worth."""
