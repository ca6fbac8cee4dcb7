//! The life of a VM as a state machine: what each command does in each state, and where each event leads. Pure: it knows
//! no files and no processes.

use std::fmt;

use super::state::Status;

/// What a VM is found to be, by its state file and its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// There is no such VM.
    Absent,
    /// A start that makes it goes on, or was cut off: its maker is gone when its lock is free.
    Creating,
    Stopped,
    /// Its hypervisor runs, its agent has not been met.
    Starting,
    Running,
    /// Its processors stand still while a snapshot is made, or since one was cut off.
    Paused,
    /// It was asked to power off and has not ended.
    Stopping,
    /// A delete goes on, or was cut off.
    Deleting,
}

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    Start,
    Stop,
    Restart,
    Delete,
    /// With force.
    DeleteForce,
    /// What needs the agent or ssh: `ssh`, `exec`, `cp`.
    Enter,
    Console,
    /// A change of resources.
    Set,
    /// A change of published ports.
    Publish,
    /// What begins at a machine as it is: `snapshot`, `clone`.
    Snapshot,
    /// To go on from a snapshot, and lose what is.
    Restore,
    /// With force.
    RestoreForce,
}

/// What a command does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Make it and boot it.
    Create,
    /// Remove what was half made, then make it.
    ClearAndCreate,
    Boot,
    /// Meet the agent of a machine that boots.
    Meet,
    /// End it, then boot it.
    EndAndBoot,
    End,
    /// Remove it.
    Remove,
    EndAndRemove,
    /// Use it as it is.
    Use,
    /// Let its processors go on; then it is as if it had run all the time.
    Resume,
    /// It is so already.
    Nothing,
    Refuse(Refusal),
}

/// Why a command is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    Absent,
    AlreadyRunning,
    /// It must be stopped first.
    Active,
    StillStarting,
    /// It must be started first.
    Inactive,
    /// A command on it was cut off.
    HalfMade,
}

/// What happens to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Its id is taken and its state written for the first time.
    Reserved,
    /// Its disk is whole.
    Made,
    /// Its hypervisor has been started.
    Launched,
    /// Its agent was met and configured.
    Met,
    /// It was asked to power off.
    Asked,
    /// The command that asked gave up.
    Reprieved,
    /// Its processors are about to be stopped for a snapshot.
    Paused,
    /// They go on.
    Resumed,
    /// Its hypervisor is gone.
    Ended,
    /// Its removal begins.
    Condemned,
    /// Its state file is gone.
    Removed,
}

impl State {
    pub const ALL: [State; 8] = [
        State::Absent,
        State::Creating,
        State::Stopped,
        State::Starting,
        State::Running,
        State::Paused,
        State::Stopping,
        State::Deleting,
    ];

    /// What it is: the file tells what was last done, the process whether that still holds.
    pub fn of(file: Option<Status>, alive: bool) -> State {
        match file {
            None => State::Absent,
            Some(Status::Creating) => State::Creating,
            Some(Status::Deleting) => State::Deleting,
            Some(Status::Stopped) => State::Stopped,
            Some(_) if !alive => State::Stopped,
            Some(Status::Starting) => State::Starting,
            Some(Status::Running) => State::Running,
            Some(Status::Paused) => State::Paused,
            Some(Status::Stopping) => State::Stopping,
        }
    }

    /// Whether a hypervisor runs.
    pub fn is_active(self) -> bool {
        matches!(self, State::Starting | State::Running | State::Paused | State::Stopping)
    }

    /// The state after the event; `None` where it cannot happen.
    pub fn after(self, event: Event) -> Option<State> {
        Some(match (self, event) {
            (State::Absent, Event::Reserved) => State::Creating,
            (State::Creating, Event::Made) => State::Stopped,
            (State::Stopped, Event::Launched) => State::Starting,
            (State::Starting, Event::Met) => State::Running,
            (State::Starting | State::Running | State::Paused | State::Stopping, Event::Asked) => State::Stopping,
            (State::Stopping, Event::Reprieved) => State::Running,
            (State::Running, Event::Paused) => State::Paused,
            (State::Paused, Event::Resumed) => State::Running,
            // Of its own accord, by a command, or at the hand of the kernel.
            (State::Stopped, Event::Ended) => State::Stopped,
            (active, Event::Ended) if active.is_active() => State::Stopped,
            (State::Creating | State::Stopped | State::Deleting, Event::Condemned) => State::Deleting,
            (State::Deleting, Event::Removed) => State::Absent,
            _ => return None,
        })
    }

    /// What a command does to a VM in this state. The caller holds the VM's lock, so no other command is at it: one
    /// that has left `Creating`, `Starting`, `Stopping` or `Deleting` behind was cut off.
    pub fn decide(self, command: Command) -> Action {
        use Action::Refuse;
        use Command as C;
        use State as S;
        match (command, self) {
            (C::Start, S::Absent) => Action::Create,
            (C::Start, S::Creating | S::Deleting) => Action::ClearAndCreate,
            (C::Start, S::Stopped) => Action::Boot,
            (C::Start, S::Starting) => Action::Meet,
            (C::Start, S::Running) => Refuse(Refusal::AlreadyRunning),
            (C::Start, S::Stopping) => Action::EndAndBoot,
            (C::Stop, S::Creating | S::Deleting | S::Stopped) => Action::Nothing,
            (C::Stop, S::Starting | S::Running | S::Stopping) => Action::End,
            (C::Restart, S::Stopped) => Action::Boot,
            (C::Restart, S::Starting | S::Running | S::Stopping) => Action::EndAndBoot,
            (C::Delete | C::DeleteForce, S::Creating | S::Deleting | S::Stopped) => Action::Remove,
            (C::Delete, S::Starting | S::Running | S::Paused | S::Stopping) => Refuse(Refusal::Active),
            (C::DeleteForce, S::Starting | S::Running | S::Paused | S::Stopping) => Action::EndAndRemove,
            // Without the lock: a snapshot may go on, and it is over soon.
            (C::Enter, S::Running | S::Paused) => Action::Use,
            (C::Enter | C::Snapshot, S::Starting) => Refuse(Refusal::StillStarting),
            (C::Enter, S::Stopped | S::Stopping) => Refuse(Refusal::Inactive),
            (C::Console, S::Starting | S::Running | S::Paused | S::Stopping) => Action::Use,
            (C::Console, S::Stopped) => Refuse(Refusal::Inactive),
            (C::Set, S::Stopped) => Action::Use,
            (C::Publish, S::Stopped | S::Starting | S::Running | S::Paused | S::Stopping) => Action::Use,
            (C::Set, S::Starting | S::Running | S::Paused | S::Stopping) => Refuse(Refusal::Active),
            // Of one that is stopped there is a disk.
            (C::Snapshot, S::Running | S::Stopped) => Action::Use,
            (C::Snapshot, S::Stopping) => Refuse(Refusal::Active),
            (C::Restore | C::RestoreForce, S::Stopped) => Action::Boot,
            (C::Restore, S::Starting | S::Running | S::Paused | S::Stopping) => Refuse(Refusal::Active),
            (C::RestoreForce, S::Starting | S::Running | S::Paused | S::Stopping) => Action::EndAndBoot,
            (C::Start | C::Stop | C::Restart | C::Snapshot, S::Paused) => Action::Resume,
            (
                C::Restart | C::Enter | C::Console | C::Set | C::Publish | C::Snapshot | C::Restore | C::RestoreForce,
                S::Creating | S::Deleting,
            ) => Refuse(Refusal::HalfMade),
            (_, S::Absent) => Refuse(Refusal::Absent),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Absent => "absent",
            State::Creating => "creating",
            State::Stopped => "stopped",
            State::Starting => "starting",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopping => "stopping",
            State::Deleting => "deleting",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row for each state, a column for each command: create, clear+create, boot, meet, end+boot, end, remove,
    /// end+remove, use, resume (g), nothing; in capitals why not: No such VM, Running, aCtive, starting Yet, Inactive,
    /// Half made.
    const COMMANDS: &str = "
                  start  stop  restart  delete  force  enter  console  set  publish  snapshot  restore  anyway
        absent    c      N     N        N       N      N      N        N    N        N         N        N
        creating  cc     .     H        r       r      H      H        H    H        H         H        H
        stopped   b      .     b        r       r      I      I        u    u        u         b        b
        starting  m      e     eb       C       er     Y      u        C    u        Y         C        eb
        running   R      e     eb       C       er     u      u        C    u        u         C        eb
        paused    g      g     g        C       er     u      u        C    u        g         C        eb
        stopping  eb     e     eb       C       er     I      u        C    u        C         C        eb
        deleting  cc     .     H        r       r      H      H        H    H        H         H        H";

    fn code(action: Action) -> &'static str {
        match action {
            Action::Create => "c",
            Action::ClearAndCreate => "cc",
            Action::Boot => "b",
            Action::Meet => "m",
            Action::EndAndBoot => "eb",
            Action::End => "e",
            Action::Remove => "r",
            Action::EndAndRemove => "er",
            Action::Use => "u",
            Action::Resume => "g",
            Action::Nothing => ".",
            Action::Refuse(Refusal::Absent) => "N",
            Action::Refuse(Refusal::AlreadyRunning) => "R",
            Action::Refuse(Refusal::Active) => "C",
            Action::Refuse(Refusal::StillStarting) => "Y",
            Action::Refuse(Refusal::Inactive) => "I",
            Action::Refuse(Refusal::HalfMade) => "H",
        }
    }

    /// The cells of a table by the names of their row and column.
    fn cells(table: &str) -> Vec<(String, String, String)> {
        let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).filter(|l| !l.is_empty());
        let heading = lines.next().unwrap();
        let row = |words: Vec<&str>| -> Vec<(String, String, String)> {
            assert_eq!(words.len(), heading.len() + 1, "{words:?}");
            let cells = heading.iter().zip(&words[1..]);
            cells.map(|(column, cell)| (words[0].into(), (*column).into(), (*cell).into())).collect()
        };
        lines.flat_map(row).collect()
    }

    fn state(name: &str) -> State {
        State::ALL.into_iter().find(|state| state.to_string() == name).unwrap()
    }

    #[test]
    fn each_command_does_in_each_state_what_the_table_says() {
        use Command::*;
        let columns = [
            ("start", Start),
            ("stop", Stop),
            ("restart", Restart),
            ("delete", Delete),
            ("force", DeleteForce),
            ("enter", Enter),
            ("console", Console),
            ("set", Set),
            ("publish", Publish),
            ("snapshot", Snapshot),
            ("restore", Restore),
            ("anyway", RestoreForce),
        ];
        let cells = cells(COMMANDS);
        assert_eq!(cells.len(), State::ALL.len() * columns.len());
        for (row, column, expected) in cells {
            let command = columns.iter().find(|(name, _)| *name == column).unwrap().1;
            assert_eq!(code(state(&row).decide(command)), expected, "{column} of a VM that is {row}");
        }
    }

    const EVENTS: &str = "
                  reserved  made     launched  met      asked     reprieved  paused  resumed  ended    condemned  removed
        absent    creating  -        -         -        -         -          -       -        -        -          -
        creating  -         stopped  -         -        -         -          -       -        -        deleting   -
        stopped   -         -        starting  -        -         -          -       -        stopped  deleting   -
        starting  -         -        -         running  stopping  -          -       -        stopped  -          -
        running   -         -        -         -        stopping  -          paused  -        stopped  -          -
        paused    -         -        -         -        stopping  -          -       running  stopped  -          -
        stopping  -         -        -         -        stopping  running    -       -        stopped  -          -
        deleting  -         -        -         -        -         -          -       -        -        deleting   absent";

    #[test]
    fn each_event_leads_in_each_state_where_the_table_says() {
        use Event::*;
        let columns = [
            ("reserved", Reserved),
            ("made", Made),
            ("launched", Launched),
            ("met", Met),
            ("asked", Asked),
            ("reprieved", Reprieved),
            ("paused", Paused),
            ("resumed", Resumed),
            ("ended", Ended),
            ("condemned", Condemned),
            ("removed", Removed),
        ];
        let cells = cells(EVENTS);
        assert_eq!(cells.len(), State::ALL.len() * columns.len());
        for (row, column, expected) in cells {
            let event = columns.iter().find(|(name, _)| *name == column).unwrap().1;
            let after = state(&row).after(event).map_or("-".to_string(), |state| state.to_string());
            assert_eq!(after, expected, "{column} of a VM that is {row}");
        }
    }

    #[test]
    fn a_file_is_believed_only_as_far_as_its_process_lives() {
        for (file, alive, dead) in [
            (Status::Creating, State::Creating, State::Creating),
            (Status::Starting, State::Starting, State::Stopped),
            (Status::Running, State::Running, State::Stopped),
            (Status::Paused, State::Paused, State::Stopped),
            (Status::Stopping, State::Stopping, State::Stopped),
            (Status::Stopped, State::Stopped, State::Stopped),
            (Status::Deleting, State::Deleting, State::Deleting),
        ] {
            assert_eq!((State::of(Some(file), true), State::of(Some(file), false)), (alive, dead));
        }
        assert_eq!(State::of(None, false), State::Absent);
    }
}
