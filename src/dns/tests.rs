use simple_dns::rdata::OPTCode;

use super::*;

struct Two;

/// Cluster, member and VM.
const MEMBERS: [(&str, &str, &str); 4] = [
    ("red", "node1", "red-node1"),
    ("red", "node2", "red-node2"),
    ("org", "node1", "org-node1"),
    ("org", "web1", "org-web1"),
];

impl Names for Two {
    fn address(&self, vm: &str) -> Option<Ipv4Addr> {
        match vm {
            "web" => Some(Ipv4Addr::new(10, 0, 0, 11)),
            "db" => Some(Ipv4Addr::new(10, 0, 0, 12)),
            "node1" => Some(Ipv4Addr::new(10, 0, 0, 13)),
            "red-node1" => Some(Ipv4Addr::new(10, 0, 0, 21)),
            "red-node2" => Some(Ipv4Addr::new(10, 0, 0, 22)),
            "org-node1" => Some(Ipv4Addr::new(10, 0, 0, 31)),
            "org-web1" => Some(Ipv4Addr::new(10, 0, 0, 32)),
            _ => None,
        }
    }

    fn address6(&self, vm: &str) -> Option<Ipv6Addr> {
        (vm == "web").then(|| "fd00::5054:ff:fe00:b".parse().unwrap())
    }

    fn name(&self, address: IpAddr) -> Option<String> {
        let web = ["10.0.0.11", "fd00::5054:ff:fe00:b"].map(|text| text.parse::<IpAddr>().unwrap());
        let own = ["db", "red-node2"].into_iter().find(|vm| self.address(vm).map(IpAddr::V4) == Some(address));
        if web.contains(&address) { Some("web".into()) } else { own.map(String::from) }
    }

    fn cluster(&self, address: IpAddr) -> Option<String> {
        let own = MEMBERS.into_iter().find(|(_, _, vm)| self.address(vm).map(IpAddr::V4) == Some(address));
        own.map(|(cluster, _, _)| cluster.to_string())
    }

    fn member(&self, cluster: &str, member: &str) -> Option<String> {
        MEMBERS.into_iter().find(|all| (all.0, all.1) == (cluster, member)).map(|(_, _, vm)| vm.to_string())
    }

    fn has_cluster(&self, cluster: &str) -> bool {
        MEMBERS.iter().any(|all| all.0 == cluster)
    }

    fn subnet(&self) -> Subnet {
        Subnet::default()
    }

    fn network6(&self) -> Option<Network6> {
        Some("fd00::/64".parse().unwrap())
    }
}

fn query(name: &str, kind: TYPE) -> Vec<u8> {
    let mut packet = Packet::new_query(7);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    packet.questions.push(Question::new(Name::new(name).unwrap(), kind.into(), CLASS::IN.into(), false));
    packet.build_bytes_vec().unwrap()
}

/// The name under which an address has its name (RFC 3596, section 2.5).
fn reverse(address: &str) -> String {
    let number: u128 = address.parse::<Ipv6Addr>().unwrap().into();
    let digits = (0..32).map(|at| format!("{:x}.", (number >> (4 * at)) & 15));
    digits.chain(["ip6.arpa".to_string()]).collect()
}

/// The code, and the first answer as text.
fn ask(name: &str, kind: TYPE) -> Option<(RCODE, String)> {
    ask_as(None, name, kind)
}

fn ask_as(asker: Option<IpAddr>, name: &str, kind: TYPE) -> Option<(RCODE, String)> {
    let bytes = match handle(&query(name, kind), &Two, asker) {
        Outcome::Answer(bytes) => bytes,
        Outcome::Forward => return None,
        Outcome::Ignore => panic!("it is a query"),
    };
    let reply = Packet::parse(&bytes).unwrap();
    assert_eq!((reply.id(), reply.questions.len()), (7, 1));
    assert!(reply.has_flags(PacketFlag::RESPONSE | PacketFlag::RECURSION_AVAILABLE | PacketFlag::RECURSION_DESIRED));
    let text = reply.answers.first().map_or(String::new(), |record| match &record.rdata {
        RData::A(a) => Ipv4Addr::from(a.address).to_string(),
        RData::AAAA(a) => Ipv6Addr::from(a.address).to_string(),
        RData::PTR(name) => name.0.to_string(),
        other => format!("{other:?}"),
    });
    // What is not there is so for some seconds, and says it.
    assert_eq!(text.is_empty(), reply.name_servers.len() == 1);
    Some((reply.rcode(), text))
}

#[test]
fn machines_have_their_names() {
    let found = |text: &str| Some((RCODE::NoError, text.to_string()));
    let missing = Some((RCODE::NameError, String::new()));
    for (name, kind, expected) in [
        ("web.puter", TYPE::A, found("10.0.0.11")),
        ("web", TYPE::A, found("10.0.0.11")),
        ("WEB.Puter", TYPE::A, found("10.0.0.11")),
        ("db.puter", TYPE::A, found("10.0.0.12")),
        ("web.puter", TYPE::TXT, found("")),
        ("web.puter", TYPE::MX, found("")),
        ("puter", TYPE::A, found("")),
        ("host.puter", TYPE::A, found("10.0.0.1")),
        ("host", TYPE::A, found("10.0.0.1")),
        ("nobody.puter", TYPE::A, missing.clone()),
        ("nobody.puter", TYPE::TXT, missing.clone()),
        ("nobody", TYPE::A, missing.clone()),
        ("nobody", TYPE::AAAA, missing.clone()),
        ("a.web.puter", TYPE::A, missing.clone()),
        ("11.0.0.10.in-addr.arpa", TYPE::PTR, found("web.puter")),
        ("1.0.0.10.in-addr.arpa", TYPE::PTR, found("host.puter")),
        ("99.0.0.10.in-addr.arpa", TYPE::PTR, missing.clone()),
        ("11.0.0.10.in-addr.arpa", TYPE::A, found("")),
        ("web", TYPE::AAAA, found("fd00::5054:ff:fe00:b")),
        ("WEB.puter", TYPE::AAAA, found("fd00::5054:ff:fe00:b")),
        ("host.puter", TYPE::AAAA, found("fd00::1")),
        ("db.puter", TYPE::AAAA, found("")),
        (&reverse("fd00::5054:ff:fe00:b"), TYPE::PTR, found("web.puter")),
        (&reverse("fd00::1").to_uppercase(), TYPE::PTR, found("host.puter")),
        (&reverse("fd00::2"), TYPE::PTR, missing.clone()),
        (&reverse("fd00::1"), TYPE::AAAA, found("")),
    ] {
        assert_eq!(ask(name, kind), expected, "{name} {kind:?}");
    }
}

#[test]
fn members_of_a_cluster_know_one_another() {
    let at = |text: &str| Some((RCODE::NoError, text.to_string()));
    let (missing, elsewhere) = (Some((RCODE::NameError, String::new())), None);
    let (red1, red2, org1, org_web, alone) = ("10.0.0.21", "10.0.0.22", "10.0.0.31", "10.0.0.32", "10.0.0.13");
    // The asker, the question, the answer.
    for (asker, name, expected) in [
        (red1, "node2", at(red2)),
        (red1, "node2.puter", at(red2)),
        (red1, "NODE2.red", at(red2)),
        (red1, "node2.red.puter", at(red2)),
        (red1, "node1", at(red1)),
        (org_web, "node1", at(org1)),
        (org_web, "node1.puter", at(org1)),
        // There are no members of these names in the asker's own.
        (red1, "web1", missing.clone()),
        (org1, "node2", missing.clone()),
        // Machines by their own names, and other clusters by the whole one.
        (red1, "web", at("10.0.0.11")),
        (red1, "org-web1", at(org_web)),
        (red1, "web1.org.puter", at(org_web)),
        (red1, "web1.org", elsewhere.clone()),
        (org1, "example.org", elsewhere.clone()),
        (org1, "web1.org", at(org_web)),
        // From outside a member has its whole name alone.
        (alone, "node1", at(alone)),
        (alone, "node2", missing.clone()),
        (alone, "node2.puter", missing.clone()),
        (alone, "node2.red", elsewhere.clone()),
        (alone, "node2.red.puter", at(red2)),
        (alone, "node3.red.puter", missing.clone()),
        (alone, "a.node2.red.puter", missing.clone()),
        (alone, "node2.blue.puter", missing.clone()),
        (alone, "red.puter", at("")),
        (alone, "blue.puter", missing.clone()),
    ] {
        assert_eq!(ask_as(Some(asker.parse().unwrap()), name, TYPE::A), expected, "{asker} asks for {name}");
    }
    let asker = Some(red1.parse().unwrap());
    assert_eq!(ask_as(asker, "node2", TYPE::TXT), at(""), "the name is there");
    assert_eq!(ask_as(asker, "22.0.0.10.in-addr.arpa", TYPE::PTR), at("red-node2.puter"));
}

#[test]
fn the_rest_is_for_the_hosts_servers() {
    for (name, kind) in [
        ("example.org", TYPE::A),
        ("example.org", TYPE::Unknown(65)),
        ("puter.org", TYPE::A),
        ("web.puter.org", TYPE::A),
        ("org", TYPE::NS),
        ("1.1.168.192.in-addr.arpa", TYPE::PTR),
        ("x.0.0.10.in-addr.arpa", TYPE::PTR),
        ("10.in-addr.arpa", TYPE::PTR),
        (&reverse("fd00:0:0:1::1"), TYPE::PTR),
        (&reverse("fd00::1").replacen("1.0.", "10.", 1), TYPE::PTR),
        (&reverse("fd00::1").replacen("1.", "", 1), TYPE::PTR),
        (&reverse("fd00::1").replacen("1.", "g.", 1), TYPE::PTR),
        ("ip6.arpa", TYPE::PTR),
    ] {
        assert_eq!(ask(name, kind), None, "{name} {kind:?}");
    }
}

#[test]
fn edns_is_answered_in_kind() {
    let plain = query("web.puter", TYPE::A);
    let mut packet = Packet::parse(&plain).unwrap();
    let codes = vec![OPTCode { code: 10, data: vec![1; 8].into() }];
    *packet.opt_mut() = Some(OPT { opt_codes: codes, udp_packet_size: 4096, version: 0 });
    let Outcome::Answer(bytes) = handle(&packet.build_bytes_vec().unwrap(), &Two, None) else {
        panic!("it is a query")
    };
    let reply = Packet::parse(&bytes).unwrap();
    assert_eq!(reply.opt().map(|opt| opt.udp_packet_size), Some(UDP_SIZE));
    assert_eq!(reply.answers.len(), 1);
}

#[test]
fn what_is_no_good_query_is_refused_or_ignored() {
    let code = |bytes: &[u8]| match handle(bytes, &Two, None) {
        Outcome::Answer(bytes) => Some(bytes[3] & 0x0f),
        Outcome::Forward => panic!("not this"),
        Outcome::Ignore => None,
    };
    let good = query("web.puter", TYPE::A);
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    assert_eq!(code(&good), Some(0));
    assert_eq!(code(&[]), None);
    assert_eq!(code(&good[..11]), None);
    assert_eq!(code(&with(2, 0x81)), None, "an answer");
    assert_eq!(code(&with(2, 0x21)), Some(4), "an update");
    assert_eq!(code(&with(5, 0)), Some(1), "no question");
    assert_eq!(code(&with(5, 2)), Some(1), "two questions");
    assert_eq!(code(&with(7, 1)), Some(1), "an answer in a query");
    assert_eq!(code(&with(4, 0xff)), Some(1), "very many questions");
    assert_eq!(code(&with(good.len() - 1, 3)), Some(5), "CHAOS");
    assert_eq!(code(&good[..good.len() - 1]), Some(1), "cut off");
    assert_eq!(code(&with(12, 0xc0)), Some(1), "a name that points to itself");
    // What is refused names the question where there is one.
    let refused = refusal(&good, RCODE::ServerFailure);
    assert_eq!(Packet::parse(&refused).unwrap().questions.len(), 1);
    assert_eq!(refused[12..], good[12..]);
}

#[test]
fn no_bytes_make_it_fail() {
    let mut random = 1_u64;
    let mut next = || {
        // Knuth's multiplier.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize
    };
    let seeds = [query("web.puter", TYPE::A), query("11.0.0.10.in-addr.arpa", TYPE::PTR), query("a.b", TYPE::TXT)];
    for _ in 0..200_000 {
        let mut bytes = seeds[next() % seeds.len()].clone();
        for _ in 0..=next() % 4 {
            let at = next() % bytes.len();
            bytes[at] = next() as u8;
        }
        bytes.truncate(next() % (bytes.len() + 1) + usize::from(next() % 2 == 0) * bytes.len());
        if let Outcome::Answer(answer) = handle(&bytes, &Two, None) {
            assert!((HEADER..=512).contains(&answer.len()));
            assert_eq!(answer[..2], bytes[..2]);
        }
    }
}

#[test]
fn a_type_that_is_new_to_us_is_a_question_as_any_other() {
    // RFC 3597: 64,000 is nobody's yet, 0 is nobody's ever, 256 is a URI.
    for kind in [0u16, 256, 64_000] {
        let ask = |name: &str| {
            let mut bytes = query(name, TYPE::A);
            let end = bytes.len();
            bytes[end - 4..end - 2].copy_from_slice(&kind.to_be_bytes());
            (bytes.clone(), handle(&bytes, &Two, None))
        };
        assert_eq!(ask("example.org").1, Outcome::Forward, "{kind}");
        for (name, code) in [("web.puter", 0), ("nobody.puter", 3)] {
            let (asked, outcome) = ask(name);
            let Outcome::Answer(answer) = outcome else { panic!("{kind} {name}: {outcome:?}") };
            assert_eq!(answer[3] & 15, code, "{kind} {name}");
            assert_eq!(answer[HEADER..asked.len()], asked[HEADER..], "{kind} {name}: the question is repeated");
            assert_eq!((answer[7], answer[9]), (0, 1), "{kind} {name}: no answer, and for how long");
        }
    }
}
