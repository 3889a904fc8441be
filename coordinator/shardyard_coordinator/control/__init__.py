"""Following what runs: events of gangs become rows and events of jobs; losses become another attempt."""
