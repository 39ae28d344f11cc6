"""What people ask about products: the report, explanations, and programs run from the command line."""
