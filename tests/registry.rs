//! Pulls, from hostile servers in this process and from a real registry.

mod registry {
    pub mod bombs;
    pub mod child;
    pub mod hostile;
    pub mod image;
    pub mod login;
    pub mod mirror;
    pub mod odds;
    pub mod patience;
    pub mod proxy;
    pub mod real;
    #[path = "../e2e/terminal.rs"]
    pub mod screen;
    pub mod server;
    pub mod terminal;
    pub mod tls;
}
