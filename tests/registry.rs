//! Pulls, from hostile servers in this process and from a real registry.

mod registry {
    pub mod hostile;
    pub mod image;
    pub mod odds;
    pub mod real;
    #[path = "../e2e/terminal.rs"]
    pub mod screen;
    pub mod server;
    pub mod terminal;
}
